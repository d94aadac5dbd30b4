# SPDX-License-Identifier: Apache-2.0
"""The tables of TFLite as data: fields by slot, element types, operators and their options. Pure.

From schema.fbs of LiteRT 2.3 (schema version 3, file identifier ``TFL3``). A field that is not here
is refused by the reader, so that nothing in a file goes unseen.
"""

from __future__ import annotations

from collections.abc import Mapping

from edge_sdk.flatbuffer import Field, Schema

IDENTIFIER = b"TFL3"
VERSION = 3

DTYPES: dict[int, tuple[str, int]] = {
    0: ("float32", 32),
    1: ("float16", 16),
    2: ("int32", 32),
    3: ("uint8", 8),
    4: ("int64", 64),
    5: ("string", 0),
    6: ("bool", 8),
    7: ("int16", 16),
    8: ("complex64", 64),
    9: ("int8", 8),
    10: ("float64", 64),
    11: ("complex128", 128),
    12: ("uint64", 64),
    13: ("resource", 0),
    14: ("variant", 0),
    15: ("uint32", 32),
    16: ("uint16", 16),
    17: ("int4", 4),
    18: ("bfloat16", 16),
    19: ("int2", 2),
    20: ("uint4", 4),
    21: ("float8e4m3fn", 8),
    22: ("float8e5m2", 8),
}
"""Element types by their number in TFLite: name and bits; no bits: not numbers."""

ENUMS: dict[str, tuple[str, ...]] = {
    "padding": ("SAME", "VALID"),
    "activation": ("NONE", "RELU", "RELU_N1_TO_1", "RELU6", "TANH", "SIGN_BIT"),
    "weights_format": ("DEFAULT", "SHUFFLED4x16INT8"),
    "kernel_type": ("FULL", "BASIC"),
    "mirror": ("REFLECT", "SYMMETRIC"),
    "combiner": ("SUM", "MEAN", "SQRTN"),
    "lsh": ("UNKNOWN", "SPARSE", "DENSE"),
    "dtype": tuple(name for name, _ in DTYPES.values()),
}
"""Words that options are spelled in, by their number; all are stored as one byte."""

_SHORT = {
    "act": "fused_activation_function:activation",
    "asym": "asymmetric_quantize_inputs:?",
    "strides": "stride_w:i stride_h:i",
    "dilations": "dilation_w_factor:i=1 dilation_h_factor:i=1",
}

Options = Mapping[str, str]
"""For a table of options, the word list of each of its fields that is one of ENUMS."""


def _fields(spec: str) -> tuple[Schema, Options]:
    """Read ``name:kind=default ..``; ``-`` is a slot that is no longer used."""
    words = " ".join(_SHORT.get(word, word) for word in spec.split()).split()
    fields: list[Field | None] = []
    enums: dict[str, str] = {}
    for word in words:
        name, _, rest = word.partition(":")
        kind, _, default = rest.partition("=")
        if kind in ENUMS:
            enums[name] = kind
            kind = "b"
        fields.append(Field(name, kind, _default(kind, default)) if kind else None)
    return tuple(fields), enums


def _default(kind: str, text: str) -> int | float:
    number = float(text or 0)
    return number if kind in "fd" else bool(number) if kind == "?" else int(number)


def _schema(spec: str) -> Schema:
    return _fields(spec)[0]


MODEL = _schema(
    "version:I operator_codes:[table subgraphs:[table description:string buffers:[table "
    "metadata_buffer:[i metadata:[table signature_defs:[table external_buffer_groups:[table "
    "external_buffers:[table"
)
OPERATOR_CODE = _schema(
    "deprecated_builtin_code:b custom_code:string version:i=1 builtin_code:i"
)  # fmt: skip
SUBGRAPH = _schema(
    "tensors:[table inputs:[i outputs:[i operators:[table name:string debug_metadata_index:i=-1"
)
TENSOR = _schema(
    "shape:[i type:b buffer:I name:string quantization:table is_variable:? sparsity:table "
    "shape_signature:[i has_rank:? variant_tensors:[table external_buffer:I"
)
QUANTIZATION = _schema(
    "min:[f max:[f scale:[f zero_point:[q details_type:B details:table quantized_dimension:i"
)
OPERATOR = _schema(
    "opcode_index:I inputs:[i outputs:[i builtin_options_type:B builtin_options:table "
    "custom_options:[B custom_options_format:b mutating_variable_inputs:[? intermediates:[i "
    "large_custom_options_offset:Q large_custom_options_size:Q builtin_options_2_type:B "
    "builtin_options_2:table debug_metadata_index:i=-1"
)
BUFFER = _schema("data:[B offset:Q size:Q")
METADATA = _schema("name:string buffer:I")
TENSOR_MAP = _schema("name:string tensor_index:I")
SIGNATURE = _schema("inputs:[table outputs:[table signature_key:string - subgraph_index:I")

_OPTIONS = """
  Conv2D padding:padding strides act dilations quantized_bias_type:dtype
  DepthwiseConv2D padding:padding strides depth_multiplier:i act dilations
  ConcatEmbeddings num_channels:i num_columns_per_channel:[i embedding_dim_per_channel:[i
  LSHProjection type:lsh
  Pool2D padding:padding strides filter_width:i filter_height:i act
  SVDF rank:i act asym
  RNN act asym
  FullyConnected act weights_format:weights_format keep_num_dims:? asym quantized_bias_type:dtype \
    quant_spec:[B
  Softmax beta:f
  Concatenation axis:i act
  Add act pot_scale_int16:?=1
  L2Norm act
  LocalResponseNormalization radius:i bias:f alpha:f beta:f
  LSTM act cell_clip:f proj_clip:f kernel_type:kernel_type asym
  ResizeBilinear - - align_corners:? half_pixel_centers:?
  Call subgraph:I
  Reshape new_shape:[i
  SkipGram ngram_size:i max_skip_size:i include_all_ngrams:?
  SpaceToDepth block_size:i
  EmbeddingLookupSparse combiner:combiner
  Mul act
  Pad
  Gather axis:i batch_dims:i
  BatchToSpaceND
  SpaceToBatchND
  Transpose
  Reducer keep_dims:?
  Sub act pot_scale_int16:?=1
  Div act
  Squeeze squeeze_dims:[i
  SequenceRNN time_major:? act asym
  StridedSlice begin_mask:i end_mask:i ellipsis_mask:i new_axis_mask:i shrink_axis_mask:i offset:?
  Exp
  TopKV2
  Split num_splits:i
  LogSoftmax
  Cast in_data_type:dtype out_data_type:dtype
  Dequantize
  MaximumMinimum
  ArgMax output_type:dtype
  Less
  Neg
  PadV2
  Greater
  GreaterEqual
  LessEqual
  Select
  Slice
  TransposeConv padding:padding strides act quantized_bias_type:dtype
  SparseToDense validate_indices:?
  Tile
  ExpandDims
  Equal
  NotEqual
  Shape out_type:dtype
  Pow
  ArgMin output_type:dtype
  FakeQuant min:f max:f num_bits:i narrow_range:?
  Pack values_count:i axis:i
  LogicalOr
  OneHot axis:i
  LogicalAnd
  LogicalNot
  Unpack num:i axis:i
  FloorDiv
  Square
  ZerosLike
  Fill
  BidirectionalSequenceLSTM act cell_clip:f proj_clip:f merge_outputs:? time_major:?=1 asym
  BidirectionalSequenceRNN time_major:? act merge_outputs:? asym
  UnidirectionalSequenceLSTM act cell_clip:f proj_clip:f time_major:? asym \
    diagonal_recurrent_tensors:?
  FloorMod
  Range
  ResizeNearestNeighbor align_corners:? half_pixel_centers:?
  LeakyRelu alpha:f
  SquaredDifference
  MirrorPad mode:mirror
  Abs
  SplitV num_splits:i
  Unique idx_out_type:dtype=2
  ReverseV2
  AddN
  GatherNd
  Cos
  Where
  Rank
  ReverseSequence seq_dim:i batch_dim:i
  MatrixDiag
  Quantize
  MatrixSetDiag
  HardSwish
  If then_subgraph_index:i else_subgraph_index:i
  While cond_subgraph_index:i body_subgraph_index:i
  DepthToSpace block_size:i
  NonMaxSuppressionV4
  NonMaxSuppressionV5
  ScatterNd
  SelectV2
  Densify
  SegmentSum
  BatchMatMul adj_x:? adj_y:? asym
  Cumsum exclusive:? reverse:?
  CallOnce init_subgraph_index:i
  BroadcastTo
  Rfft2d
  Conv3D padding:padding stride_d:i strides act dilation_d_factor:i=1 dilations
  Hashtable table_id:i key_dtype:dtype value_dtype:dtype
  HashtableFind
  HashtableImport
  HashtableSize
  VarHandle container:string shared_name:string
  ReadVariable
  AssignVariable
  Random seed:q seed2:q
  Bucketize boundaries:[f
  Gelu approximate:?
  DynamicUpdateSlice
  UnsortedSegmentProd
  UnsortedSegmentMax
  UnsortedSegmentMin
  UnsortedSegmentSum
  ATan2
  Sign
  Bitcast
  BitwiseXor
  RightShift
"""
OPTIONS: dict[int, tuple[str, Schema, Options]] = {
    code: (name, *_fields(spec))
    for code, (name, _, spec) in enumerate(
        (line.strip().partition(" ") for line in _OPTIONS.strip().splitlines()), start=1
    )
}
"""Tables of options by their number in TFLite: name (without its ``Options``), fields, words."""

_BUILTINS = """
  ADD AVERAGE_POOL_2D CONCATENATION CONV_2D DEPTHWISE_CONV_2D DEPTH_TO_SPACE DEQUANTIZE
  EMBEDDING_LOOKUP FLOOR FULLY_CONNECTED HASHTABLE_LOOKUP L2_NORMALIZATION L2_POOL_2D
  LOCAL_RESPONSE_NORMALIZATION LOGISTIC LSH_PROJECTION LSTM MAX_POOL_2D MUL RELU RELU_N1_TO_1
  RELU6 RESHAPE RESIZE_BILINEAR RNN SOFTMAX SPACE_TO_DEPTH SVDF TANH CONCAT_EMBEDDINGS SKIP_GRAM
  CALL CUSTOM EMBEDDING_LOOKUP_SPARSE PAD UNIDIRECTIONAL_SEQUENCE_RNN GATHER BATCH_TO_SPACE_ND
  SPACE_TO_BATCH_ND TRANSPOSE MEAN SUB DIV SQUEEZE UNIDIRECTIONAL_SEQUENCE_LSTM STRIDED_SLICE
  BIDIRECTIONAL_SEQUENCE_RNN EXP TOPK_V2 SPLIT LOG_SOFTMAX DELEGATE BIDIRECTIONAL_SEQUENCE_LSTM
  CAST PRELU MAXIMUM ARG_MAX MINIMUM LESS NEG PADV2 GREATER GREATER_EQUAL LESS_EQUAL SELECT SLICE
  SIN TRANSPOSE_CONV SPARSE_TO_DENSE TILE EXPAND_DIMS EQUAL NOT_EQUAL LOG SUM SQRT RSQRT SHAPE POW
  ARG_MIN FAKE_QUANT REDUCE_PROD REDUCE_MAX PACK LOGICAL_OR ONE_HOT LOGICAL_AND LOGICAL_NOT UNPACK
  REDUCE_MIN FLOOR_DIV REDUCE_ANY SQUARE ZEROS_LIKE FILL FLOOR_MOD RANGE RESIZE_NEAREST_NEIGHBOR
  LEAKY_RELU SQUARED_DIFFERENCE MIRROR_PAD ABS SPLIT_V UNIQUE CEIL REVERSE_V2 ADD_N GATHER_ND COS
  WHERE RANK ELU REVERSE_SEQUENCE MATRIX_DIAG QUANTIZE MATRIX_SET_DIAG ROUND HARD_SWISH IF WHILE
  NON_MAX_SUPPRESSION_V4 NON_MAX_SUPPRESSION_V5 SCATTER_ND SELECT_V2 DENSIFY SEGMENT_SUM
  BATCH_MATMUL PLACEHOLDER_FOR_GREATER_OP_CODES CUMSUM CALL_ONCE BROADCAST_TO RFFT2D CONV_3D IMAG
  REAL COMPLEX_ABS HASHTABLE HASHTABLE_FIND HASHTABLE_IMPORT HASHTABLE_SIZE REDUCE_ALL
  CONV_3D_TRANSPOSE VAR_HANDLE READ_VARIABLE ASSIGN_VARIABLE BROADCAST_ARGS RANDOM_STANDARD_NORMAL
  BUCKETIZE RANDOM_UNIFORM MULTINOMIAL GELU DYNAMIC_UPDATE_SLICE RELU_0_TO_1 UNSORTED_SEGMENT_PROD
  UNSORTED_SEGMENT_MAX UNSORTED_SEGMENT_SUM ATAN2 UNSORTED_SEGMENT_MIN SIGN BITCAST BITWISE_XOR
  RIGHT_SHIFT STABLEHLO_LOGISTIC STABLEHLO_ADD STABLEHLO_DIVIDE STABLEHLO_MULTIPLY
  STABLEHLO_MAXIMUM STABLEHLO_RESHAPE STABLEHLO_CLAMP STABLEHLO_CONCATENATE
  STABLEHLO_BROADCAST_IN_DIM STABLEHLO_CONVOLUTION STABLEHLO_SLICE STABLEHLO_CUSTOM_CALL
  STABLEHLO_REDUCE STABLEHLO_ABS STABLEHLO_AND STABLEHLO_COSINE STABLEHLO_EXPONENTIAL
  STABLEHLO_FLOOR STABLEHLO_LOG STABLEHLO_MINIMUM STABLEHLO_NEGATE STABLEHLO_OR STABLEHLO_POWER
  STABLEHLO_REMAINDER STABLEHLO_RSQRT STABLEHLO_SELECT STABLEHLO_SUBTRACT STABLEHLO_TANH
  STABLEHLO_SCATTER STABLEHLO_COMPARE STABLEHLO_CONVERT STABLEHLO_DYNAMIC_SLICE
  STABLEHLO_DYNAMIC_UPDATE_SLICE STABLEHLO_PAD STABLEHLO_IOTA STABLEHLO_DOT_GENERAL
  STABLEHLO_REDUCE_WINDOW STABLEHLO_SORT STABLEHLO_WHILE STABLEHLO_GATHER STABLEHLO_TRANSPOSE
  DILATE STABLEHLO_RNG_BIT_GENERATOR REDUCE_WINDOW STABLEHLO_COMPOSITE STABLEHLO_SHIFT_LEFT
  STABLEHLO_CBRT STABLEHLO_CASE
"""
BUILTINS = tuple(_BUILTINS.split())
"""Operators by their builtin code."""

_PLACEHOLDER = BUILTINS.index("PLACEHOLDER_FOR_GREATER_OP_CODES")
SECOND_OPTIONS = {
    name
    for name in BUILTINS
    if name.startswith("STABLEHLO_") or name in {"DILATE", "REDUCE_WINDOW"}
}
"""Operators whose options are of the second kind, which is not read."""

_SAME_AS = {
    "AVERAGE_POOL_2D": "Pool2D", "MAX_POOL_2D": "Pool2D", "L2_POOL_2D": "Pool2D",
    "L2_NORMALIZATION": "L2Norm", "UNIDIRECTIONAL_SEQUENCE_RNN": "SequenceRNN",
    "MAXIMUM": "MaximumMinimum", "MINIMUM": "MaximumMinimum", "CONV_3D_TRANSPOSE": "Conv3D",
    "RANDOM_STANDARD_NORMAL": "Random", "RANDOM_UNIFORM": "Random", "MULTINOMIAL": "Random",
    "MEAN": "Reducer", "SUM": "Reducer", "REDUCE_PROD": "Reducer", "REDUCE_MAX": "Reducer",
    "REDUCE_MIN": "Reducer", "REDUCE_ANY": "Reducer", "REDUCE_ALL": "Reducer",
}  # fmt: skip
_CODES = {name.lower(): code for code, (name, _, _) in OPTIONS.items()}
OPTIONS_OF = {
    op: _CODES[key]
    for op in BUILTINS
    if (key := _SAME_AS.get(op, op.replace("_", "")).lower()) in _CODES
}
"""Which table of options an operator takes, by its number."""


def builtin(code: int, deprecated: int) -> str | None:
    """Return an operator's name from both its codes, or None if there is none of that number.

    Codes from 127 on stand in the newer field alone, where the older one has 127.
    """
    number = max(code, deprecated)
    known = 0 <= number < len(BUILTINS) and number != _PLACEHOLDER
    return BUILTINS[number] if known and min(code, deprecated) >= 0 else None
