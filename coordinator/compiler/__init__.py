# SPDX-License-Identifier: Apache-2.0
"""Forward model in, training bundle out: the only code that knows onnx and flatbuffers."""
