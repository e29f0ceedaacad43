"""Compile functions of kernels by numba such that their code needs nothing of numba."""

from collections.abc import Callable
from typing import Any

from llvmlite import binding
from numba import cfunc, types
from numba.core.registry import cpu_target

from llama_jax.numerics.cpu.machine import symbol_address
from llama_jax.numerics.cpu.object_code import SYMBOLS, add_code, target_machine

# The wrapper that numba writes for C reports exceptions to Python. This one is for functions that raise
# none, and allocate no arrays that would have to be freed.
_WRAPPER = """
target datalayout = "{program.data_layout}"
target triple = "{program.triple}"
declare void @llvm.trap()
declare i32 @"{function}"(ptr, ptr, i64)
define i64 @"{symbol}"(i64 %argument) {{
  %result = alloca i64
  %status = call i32 @"{function}"(ptr %result, ptr null, i64 %argument)
  %value = load i64, ptr %result
  ret i64 %value
}}
define void @NRT_MemInfo_call_dtor(ptr %array) {{
  call void @llvm.trap()
  unreachable
}}
"""
_OF_C = {"malloc", "calloc", "free", "sched_yield", "sqrt"}


def exported(symbol: str) -> Callable[[Callable[[int], int]], Any]:
    """Decorates a function of an int64, mostly an address, that returns one.

    What remains is an intrinsic: the function's address, by which other functions call it. numba would
    compile all of it again for each that calls it by its name.

    Args:
        symbol: to load it by, see `object_code`.

    Raises:
        RuntimeError: it refers to something else than other exported functions and some of C: to allocate
            an array, for example, to numba.
    """

    def compile_(function: Callable[[int], int]) -> Any:
        compiled = cfunc(types.int64(types.int64), error_model="numpy")(function)
        by_numba = compiled.native_name.removeprefix("cfunc.")
        code = _object_code(symbol, by_numba, compiled.inspect_llvm())
        add_code(function.__module__.rpartition(".")[2], symbol, code)
        return symbol_address(symbol)

    return compile_


def _object_code(symbol: str, function: str, assembly: str) -> bytes:
    """Of a function and of what it calls."""
    program = binding.parse_assembly(assembly)
    wrapper = _WRAPPER.format(symbol=symbol, function=function, program=program)
    program.link_in(binding.parse_assembly(wrapper))
    for value in (*program.functions, *program.global_variables):
        if not value.is_declaration and value.name != symbol:
            value.linkage = "internal"  # dropped where nothing refers to it
    machine = target_machine(*cpu_target.target_context.codegen().magic_tuple())
    passes = binding.create_new_module_pass_manager()
    passes.add_global_dead_code_eliminate_pass()
    passes.add_strip_dead_prototype_pass()
    tuning = binding.create_pipeline_tuning_options()
    passes.run(program, binding.create_pass_builder(machine, tuning))
    values = (*program.functions, *program.global_variables)
    outside = {value.name for value in values if value.is_declaration} - _OF_C
    if unknown := [name for name in outside if not name.startswith(("llvm.", SYMBOLS))]:
        raise RuntimeError(f"{symbol} refers to {', '.join(sorted(unknown))}")
    code: bytes = machine.emit_object(program)
    return code
