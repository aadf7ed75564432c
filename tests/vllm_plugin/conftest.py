"""How vLLM runs in these tests: in the process itself, with little memory, telling nobody."""

import os

# Read when vLLM is imported.
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # two ranks have no core each where there is one
    "VLLM_DISABLE_COMPILE_CACHE": "1",  # another version of the code is to be compiled anew
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
