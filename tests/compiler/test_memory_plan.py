# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from forward_models import cnn, mlp

from coordinator.compiler import build, momentum
from coordinator.compiler.arena import PAGE_BYTES, Arena
from coordinator.compiler.emit import Emit
from coordinator.compiler.graph import Graph, Shape
from coordinator.compiler.lifetimes import BLOCK, Event, at_batch, schedule
from coordinator.compiler.memory import BATCHES, Footprint, Held, footprint, unsized
from edge_sdk.bundle import Bundle

ROW = 1024 * 4  # bytes of a row of 1024 floats


def started(shape: Shape = (None, 1024)) -> Emit:
    e = Emit()
    e.input("x", np.float32, shape)
    return e


def taken(events: tuple[Event, ...]) -> list[int]:
    return [event.size for event in events if event.size >= 0]


# --- lifetimes ----------------------------------------------------------------------------------
def test_two_tensors_of_a_chain_live_at_once() -> None:
    e = started()
    y = e.Exp(e.Exp(e.Exp("x")))
    plan = schedule(e.graph(outputs=[y]), 8)
    assert taken(plan.events) == [8 * ROW, 8 * ROW]  # the output is the caller's memory
    assert plan.live_peak == 2 * 8 * ROW
    assert plan.nodes == 3


def test_what_backward_reads_again_lives_until_it_has() -> None:
    e = started()
    a = e.Exp("x")
    b = e.Exp(a)
    c = e.Exp(b)
    y = e.Mul(e.Mul(c, b), a)
    assert schedule(e.graph(outputs=[y]), 4).live_peak == 4 * 4 * ROW  # a, b, c and their product


def test_a_fixed_shape_is_written_over_where_it_ends() -> None:
    e = started((16, 1024))
    y = e.ReduceSum(e.Exp(e.Exp(e.Exp("x"))), keepdims=0)
    assert schedule(e.graph(outputs=[y]), 16).live_peak == 16 * ROW


def test_a_reshape_is_another_name_and_keeps_its_input_alive() -> None:
    e = started()
    a = e.Exp("x")
    flat = e.Reshape(a, e.ints(-1, 512))
    b = e.Exp(flat)
    y = e.ReduceSum(e.Mul(b, flat), keepdims=0)
    assert taken(schedule(e.graph(outputs=[y]), 2).events) == [2 * ROW] * 3


def test_nodes_of_constants_run_once_and_are_kept() -> None:
    e = started()
    w = e.Transpose(e.const(np.ones((8, 1024), np.float32)), perm=[1, 0])
    y = e.MatMul("x", e.Mul(w, e.const(2.0)))
    plan = schedule(e.graph(outputs=[y]), 4)
    assert (plan.nodes, plan.constants, plan.events) == (1, 8 * ROW, ())
    assert plan.folded == 2 * 8 * ROW


def test_a_product_reads_its_operand_transposed_without_a_copy() -> None:
    e = started()
    a = e.Exp("x")
    y = e.ReduceSum(e.MatMul(e.Transpose(a, perm=[1, 0]), a), keepdims=0)
    plan = schedule(e.graph(outputs=[y]), 2)
    assert plan.nodes == 3
    assert taken(plan.events) == [2 * ROW, 1024 * ROW]


def test_a_conv_takes_its_activation_in() -> None:
    e = Emit()
    e.input("x", np.float32, (None, 16, 8, 8))
    e.input("w", np.float32, (32, 16, 1, 1))
    y = e.ReduceSum(e.Relu(e.Conv("x", "w")), keepdims=0)
    plan = schedule(e.graph(outputs=[y]), 2)
    assert taken(plan.events) == [2 * 32 * 64 * 4]


def test_a_frozen_conv_writes_whole_blocks_of_channels() -> None:
    e = Emit()
    e.input("x", np.float32, (None, 3, 8, 8))
    w = e.const(np.ones((8, 3, 1, 1), np.float32))
    y = e.ReduceSum(e.Conv("x", w), keepdims=0)
    plan = schedule(e.graph(outputs=[y]), 2)
    assert taken(plan.events) == [2 * BLOCK * 64 * 4, 2 * 8 * 64 * 4]  # and unpacked for the sum


def test_an_operator_between_integers_makes_no_floats() -> None:
    e = Emit()
    e.input("x", np.int8, (None, 16, 8, 8))
    scale, zero = e.const(0.1), e.const(0, np.int8)
    w = e.DequantizeLinear(e.const(np.ones((16, 16, 1, 1)), np.int8), scale, zero)
    h = e.Relu(e.Conv(e.DequantizeLinear("x", scale, zero), w))
    y = e.DequantizeLinear(e.QuantizeLinear(h, scale, zero), scale, zero)
    plan = schedule(e.graph(outputs=[e.ReduceSum(y, keepdims=0)]), 2)
    assert taken(plan.events) == [2 * 16 * 64, 2 * 16 * 64 * 4]


def test_an_integer_conv_lays_out_the_columns_of_the_whole_batch() -> None:
    e = Emit()
    e.input("x", np.int8, (None, 16, 8, 8))
    scale, zero = e.const(0.1), e.const(0, np.int8)
    w = e.DequantizeLinear(e.const(np.ones((4, 16, 3, 3)), np.int8), scale, zero)
    h = e.Conv(e.DequantizeLinear("x", scale, zero), w, pads=[1, 1, 1, 1])
    y = e.DequantizeLinear(e.QuantizeLinear(h, scale, zero), scale, zero)
    plan = schedule(e.graph(outputs=[e.ReduceSum(y, keepdims=0)]), 2)
    assert taken(plan.events) == [2 * 4 * 64, 2 * 16 * 9 * 64, 2 * 4 * 64 * 4]


def test_a_size_that_nobody_can_tell_is_named() -> None:
    e = Emit()
    e.input("x", np.float32, (None, 4))
    found = e.NonZero("x")
    graph = e.graph(outputs=[e.Abs(found)])
    assert found in schedule(graph, 2).unknown
    assert unsized(graph) == 2


def test_large_constants_come_back_from_sizing() -> None:
    graph = Graph.load(build(cnn(), loss="cross_entropy", train="last:1").graph("onnx", "train"))
    sized = at_batch(graph, 4)
    assert sized.initializers is graph.initializers
    assert [v.name for v in sized.inputs] == [v.name for v in graph.inputs]
    assert sized.inputs[0].shape == (4, *(graph.inputs[0].shape or ())[1:])


# --- the arena ----------------------------------------------------------------------------------
def test_memory_freed_is_memory_used_again() -> None:
    arena = Arena()
    for _ in range(10):
        arena.release(arena.allocate(100 * PAGE_BYTES))
    assert (arena.resident, arena.mapped) == (100 * PAGE_BYTES, 1 << 20)


def test_neighbours_join_when_they_are_free() -> None:
    arena = Arena()
    chunks = [arena.allocate(PAGE_BYTES) for _ in range(4)]
    for chunk in (chunks[0], chunks[2], chunks[1], chunks[3]):
        arena.release(chunk)
    assert arena.allocate(1 << 20).size == 1 << 20
    assert arena.mapped == 1 << 20


def test_a_chunk_of_less_than_twice_the_need_is_given_whole() -> None:
    arena = Arena()
    assert arena.allocate((1 << 20) - PAGE_BYTES).size == 1 << 20
    assert arena.resident == (1 << 20) - PAGE_BYTES  # but only what is written is paid for


def test_regions_double_and_the_newest_is_preferred() -> None:
    arena = Arena()
    first, second = arena.allocate(1 << 20), arena.allocate(2 << 20)
    assert (first.below, second.below, arena.mapped) == (0, -1, 3 << 20)
    assert arena.allocate(100).size == 256
    assert arena.mapped == 7 << 20


# --- the whole ----------------------------------------------------------------------------------
def held(bundle: Bundle) -> Held:
    members = sum(m["size"] for m in bundle.manifest["members"].values())
    return Held(members, 4 * bundle.manifest["cost"]["trainable"], 0, 0)


def test_the_cost_table_tells_of_every_batch_and_grows_with_it() -> None:
    cost = build(mlp(), loss="cross_entropy", batch=5).manifest["cost"]
    told = [cost["ram_train"][str(n)] for n in sorted({*BATCHES, 5})]
    assert told == sorted(told)
    assert len(told) == len(cost["ram_train"])
    assert cost["ram_peak"] > cost["ram_train"]["32"]


def test_two_sets_of_weights_and_the_start_are_counted() -> None:
    bundle = build(mlp(), loss="cross_entropy")
    graph = Graph.load(bundle.graph("onnx", "train"))
    plain = footprint(graph, held(bundle), 4)
    assert plain.weights == 3 * 4 * bundle.manifest["cost"]["trainable"]
    twice = footprint(graph, held(bundle)._replace(slots=1000, is_proximal=True), 4)
    assert twice.weights == plain.weights * 4 // 3 + 2000
    assert plain.total == plain.fixed + plain.loaded + plain.weights + plain.running


def test_loading_a_large_frozen_model_may_take_more_than_running_it() -> None:
    assert Footprint(fixed=1, loaded=2, weights=3, loading=40, running=5).total == 46


def test_a_constant_is_copied_the_more_often_the_more_its_reader_packs_it() -> None:
    weight = 1 << 20
    side = 512

    def loading(frozen: bool, op: str) -> int:
        e = started((None, side, 4, 4) if op == "Conv" else (None, side))
        bias = e.const(np.zeros(side)) if frozen else e.input("p.0", np.float32, (side,))
        shape = (side, side, 1, 1) if op == "Conv" else (side, side)
        large = e.initializer("w", np.zeros(shape, np.float32))
        y = e.Add(e.MatMul("x", large), bias) if op == "MatMul" else e.Conv("x", large, bias)
        return footprint(e.graph(outputs=[y]), Held(0, 0, 0, 0), 4).loading

    spare = 4 * weight - loading(frozen=True, op="Conv")
    assert 1_400_000 < spare <= 1_500_000  # but for the bias
    assert loading(frozen=False, op="Conv") + spare == pytest.approx(2 * weight, abs=10_000)
    assert loading(frozen=False, op="MatMul") + spare == pytest.approx(3 * weight, abs=10_000)


def test_fewer_trained_layers_take_less() -> None:
    def peak(train: str) -> int:
        made = build(cnn(), loss="cross_entropy", train=train, optimizer=momentum(0.9, lr=0.1))
        return int(made.manifest["cost"]["ram_train"]["64"])

    assert peak("last:1") < peak("all")


@pytest.mark.parametrize("train", ["all", "bias", "last:1"])
def test_every_size_of_an_ordinary_model_is_known(train: str) -> None:
    graph = Graph.load(build(cnn(), loss="cross_entropy", train=train).graph("onnx", "train"))
    assert schedule(graph, 8).unknown == ()
