"""Train a policy by what it generates: each step's LoRA factors go to vLLM from memory, without a file.

REINFORCE on one machine, with the trainer and the engine in one process. The reward is the share of
generated tokens whose text holds --wanted, so that it can be seen to rise. Each step prints the mean
reward, how long the engine took to have the new weights, and how far its log-probabilities of the tokens
that it drew are from the trainer's own. Where they are far, something other than the policy answered.

    python examples/reinforce.py --model HuggingFaceTB/SmolLM2-135M-Instruct
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm import LLM, SamplingParams

import vllm_vlora

PROMPTS = (
    "Tell me about the sea.",
    "Describe a tree.",
    "What is a good day?",
    "Why is snow white?",
)


def main() -> None:
    """Train and print a line for each step."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--samples", type=int, default=8, help="answers to each prompt")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of an answer")
    parser.add_argument("--wanted", default="e", help="what a token's text should hold")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", lora_dropout=0.0)
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    policy = get_peft_model(base, config)
    optimizer = torch.optim.AdamW((p for p in policy.parameters() if p.requires_grad), lr=5e-3)
    llm = LLM(
        args.model, dtype="float32", enforce_eager=True, max_model_len=128,
        enable_lora=True, max_lora_rank=config.r, max_loras=1,
    )  # fmt: skip
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    for step in range(args.steps):
        began = time.perf_counter()
        tensors = get_peft_model_state_dict(policy)
        request = vllm_vlora.publish(llm, "policy", tensors, config=config)
        taken = 1e3 * (time.perf_counter() - began)
        sampling = SamplingParams(
            n=args.samples, temperature=1.0, max_tokens=args.tokens, ignore_eos=True, logprobs=0,
            seed=step,
        )  # fmt: skip
        done = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            sampling,
            lora_request=request,
            use_tqdm=False,
        )
        answers = [
            (output.prompt_token_ids, answer) for output in done for answer in output.outputs
        ]
        rewards = torch.tensor([_reward(tokenizer, a.token_ids, args.wanted) for _, a in answers])
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        apart, losses = 0.0, []
        for (prompt, answer), advantage in zip(answers, advantages):
            own = _log_probabilities(policy, prompt, answer.token_ids)
            drawn = [row[token].logprob for row, token in zip(answer.logprobs, answer.token_ids)]
            apart = max(apart, float((own.detach() - torch.tensor(drawn)).abs().max()))
            losses.append(-advantage * own.sum())
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()
        print(
            f"step {step:2}: reward {rewards.mean():.3f}, published in {taken:.1f} ms, "
            f"log-probabilities {apart:.1e} apart",
            flush=True,
        )


def _reward(tokenizer: Any, tokens: Sequence[int], wanted: str) -> float:
    """The share of tokens whose text holds what is wanted."""
    return sum(wanted in tokenizer.decode([token]) for token in tokens) / len(tokens)


def _log_probabilities(policy: Any, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    """Of each token of an answer, by the policy that is trained."""
    tokens = torch.tensor([[*prompt, *answer]])
    rows = policy(input_ids=tokens).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return rows.gather(1, tokens[0, len(prompt) :, None])[:, 0]


if __name__ == "__main__":
    main()
