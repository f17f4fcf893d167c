"""The Triton kernels of vllm-vlora, imported as ``vllm_vlora.triton_kernels``.

The bare name ``triton_kernels`` belongs to a package of the Triton project, which vLLM looks
for at import; this folder must never answer to it.
"""

if __name__ == "triton_kernels":
    raise ImportError(
        "this folder is vllm_vlora.triton_kernels; the bare name belongs to Triton's own package"
    )
