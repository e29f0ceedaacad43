"""What the processor has. LLVM ends the process if it finds an instruction that is missing."""

from llvmlite import binding

_features = binding.get_host_cpu_features()
HAS_AVX512 = bool(_features.get("avx512f"))
HAS_VNNI = bool(_features.get("avx512vnni"))
HAS_AMX = bool(_features.get("amx-bf16"))
