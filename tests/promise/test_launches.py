"""The count of launches: by hand on a small program, and its growth with the loops of a compiled one."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from bptt_jax._bench.launches import launches

# By hand: 3 × (4 × (fusion, dot) + copy) = 27 in the loops; of the branches the one with 2; the called computation has
# 1; and in the entry itself the custom call, the asynchronous copy and the dynamic-update-slice: 27 + 2 + 1 + 3 = 33.
PROGRAM = """
HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%fused_add (param_0.1: f32[8]) -> f32[8] {
  %param_0.1 = f32[8]{0} parameter(0)
  %multiply.9 = f32[8]{0} multiply(%param_0.1, %param_0.1)
  ROOT %add.1 = f32[8]{0} add(%multiply.9, %param_0.1)
}

%inner_body.1 (arg.1: (s32[], f32[8])) -> (s32[], f32[8]) {
  %arg.1 = (s32[], f32[8]{0}) parameter(0)
  %gte.1 = f32[8]{0} get-tuple-element(%arg.1), index=1
  %gte.2 = s32[] get-tuple-element(%arg.1), index=0
  %loop_add_fusion.1 = f32[8]{0} fusion(%gte.1), kind=kLoop, calls=%fused_add
  %dot.3 = f32[8]{0} dot(%loop_add_fusion.1, %gte.1), lhs_contracting_dims={}, rhs_contracting_dims={}
  ROOT %tuple.1 = (s32[], f32[8]{0}) tuple(%gte.2, %dot.3)
}

%condition.1 (arg.2: (s32[], f32[8])) -> pred[] {
  %arg.2 = (s32[], f32[8]{0}) parameter(0)
  %gte.3 = s32[] get-tuple-element(%arg.2), index=0
  %constant.1 = s32[] constant(4)
  ROOT %compare.1 = pred[] compare(%gte.3, %constant.1), direction=LT
}

%outer_body.1 (arg.3: (s32[], f32[8])) -> (s32[], f32[8]) {
  %arg.3 = (s32[], /*index=1*/f32[8]{0}) parameter(0)
  %while.1 = (s32[], /*index=1*/f32[8]{0}) while(%arg.3), condition=%condition.1, body=%inner_body.1, \
backend_config={"known_trip_count":{"n":"4"},"known_init_step":{"init":"0","step":"1"}}
  %gte.4 = f32[8]{0} get-tuple-element(%while.1), index=1
  %gte.5 = s32[] get-tuple-element(%while.1), index=0
  %copy.1 = f32[8]{0:T(256)} copy(%gte.4), metadata={op_name="while(condition=%x, body=%y)"}
  ROOT %tuple.2 = (s32[], f32[8]{0}) tuple(%gte.5, %copy.1)
}

%small_branch.1 (arg.4: f32[8]) -> f32[8] {
  %arg.4 = f32[8]{0} parameter(0)
  ROOT %copy.2 = f32[8]{0} copy(%arg.4)
}

%large_branch.1 (arg.5: f32[8]) -> f32[8] {
  %arg.5 = f32[8]{0} parameter(0)
  %sort.1 = f32[8]{0} sort(%arg.5), dimensions={0}, to_apply=%fused_add
  ROOT %copy.3 = f32[8]{0} copy(%sort.1)
}

ENTRY %main.1 (x.1: f32[8]) -> f32[8] {
  %x.1 = f32[8]{0} parameter(0)
  %custom-call.1 = (f32[8]{0}, s8[16]{0}) custom-call(%x.1), custom_call_target="__cublas$gemm"
  %gte.6 = f32[8]{0} get-tuple-element(%custom-call.1), index=0
  %copy-start.1 = (f32[8]{0}, f32[8]{0}, u32[]) copy-start(%gte.6)
  %copy-done.1 = f32[8]{0} copy-done(%copy-start.1)
  %zero.1 = s32[] constant(0)
  %tuple.3 = (s32[], f32[8]{0}) tuple(%zero.1, %copy-done.1)
  %while.2 = (s32[], f32[8]{0}) while(%tuple.3), condition=%condition.1, body=%outer_body.1, \
backend_config={"known_trip_count":{"n":"3"}}
  %gte.7 = f32[8]{0} get-tuple-element(%while.2), index=1
  %conditional.1 = f32[8]{0} conditional(%zero.1, %gte.7, %gte.7), \
branch_computations={%small_branch.1, %large_branch.1}
  %call.1 = f32[8]{0} call(%conditional.1), to_apply=%small_branch.1
  %bitcast.1 = f32[8]{0} bitcast(%call.1)
  ROOT %dynamic-update-slice.1 = f32[8]{0} dynamic-update-slice(%bitcast.1, %x.1, %zero.1)
}
"""


def test_a_program_counted_by_hand():
    assert launches(PROGRAM) == 33
    assert launches(PROGRAM.replace("%", "")) == 33  # as XLA prints without its default options


def test_the_largest_of_two_branches_counts():
    named = "true_computation=%large_branch.1, false_computation=%small_branch.1"
    assert launches(PROGRAM.replace("branch_computations={%small_branch.1, %large_branch.1}", named)) == 33


def test_a_loop_without_a_known_trip_count_raises():
    with pytest.raises(ValueError, match=r"while\.2 has no known_trip_count"):
        launches(PROGRAM.replace('"known_trip_count":{"n":"3"}', ""))


def test_a_text_without_an_entry_raises():
    with pytest.raises(ValueError, match=r"compiled\.as_text"):
        launches(PROGRAM.split("ENTRY")[0])


def test_the_count_of_nested_scans_grows_with_both_loops():
    def count(outer, inner):
        def f(c):
            return lax.scan(
                lambda c, _: lax.scan(lambda c, _: (jnp.sin(c @ c), None), c, length=inner), c, length=outer
            )

        return launches(jax.jit(f).lower(jnp.ones((8, 8))).compile().as_text())

    # fixed + a · outer + b · outer · inner, which three points determine.
    first, more_outer, more_inner = count(10, 7), count(20, 7), count(10, 14)
    assert more_inner - first >= 10 * 7
    assert more_outer > first
    assert count(20, 14) == more_outer + 2 * (more_inner - first)
