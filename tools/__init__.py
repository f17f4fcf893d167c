"""The offline tools of vllm-vlora: ``python -m vllm_vlora.tools`` and the ``vllm-vlora`` command."""
