"""A callback that makes transformers' ``Trainer`` train one task of a subspace, and nothing else."""

from __future__ import annotations

from typing import Any

from torch import nn

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        "VLoRACallback needs transformers; install it with: pip install 'vllm-vlora[peft]'"
    ) from error

from vllm_vlora.errors import OptionError
from vllm_vlora.model.attaching import AdaptedLayer
from vllm_vlora.model.heads import HeadSwitch
from vllm_vlora.model.training import SubspaceTrainer
from vllm_vlora.subspace.shared import SharedSubspace

_PREFIX = "vlora_"


class VLoRACallback(TrainerCallback):
    """Trains the cores or loadings of one task through transformers' ``Trainer``.

    When the Trainer is made, the task's parameters are registered in the layers that they change, heads
    that the task has are put into the model, and every other parameter of the model is frozen. The
    Trainer's own optimiser then trains them like any parameter: gradient accumulation, clipping, the
    learning rate's schedule, mixed precision, saving and ``resume_from_checkpoint`` are the Trainer's.
    (vlora's callback has an optimiser of its own beside the Trainer's, which neither clips nor follows
    the schedule, while the Trainer trains the base model.)

    transformers refuses to train a quantised model that has no PEFT adapter; train on one with
    ``SubspaceTrainer.attach``.

    The subspace changes when training ends, and not before. Training that is interrupted leaves the
    parameters in the model, from where ``trainer.train(resume_from_checkpoint=True)`` goes on;
    ``detach`` takes them out.

    Args:
        subspace: has the task already (``orthogonal_init``, ``project``).
        task_id: the task to train.
        lr: peak learning rate; None for that of the Trainer's arguments.
        num_expand: as for ``SubspaceTrainer``.
        log_every: steps between logs of the task's norm and size, as "vlora/..." among the Trainer's
            logs. The Trainer logs then, whatever its ``logging_steps``. Integrations of ``report_to`` run
            before other callbacks and do not see them.
        save_on_end: write the task back into the subspace when training ends.
        detach_on_end: take the parameters out of the model then, and thaw it. Without it the model goes
            on running the task, as ``trainer.evaluate()`` after training may want, until ``detach``.

    Raises:
        TaskNotFoundError, OptionError: as ``SubspaceTrainer``; ``log_every`` is below one.
        ModelMismatchError: when the Trainer is made, the model lacks a layer of the task.

    Examples:
        >>> from vllm_vlora.integrations.huggingface import VLoRACallback
        >>> start = orthogonal_init(joint, "new")
        >>> VLoRACallback(joint, "new", lr=1e-2).trainer.num_trainable_params
        32
    """

    def __init__(
        self,
        subspace: SharedSubspace,
        task_id: str,
        lr: float | None = 1e-3,
        num_expand: int = 0,
        log_every: int = 50,
        save_on_end: bool = True,
        *,
        detach_on_end: bool = True,
    ) -> None:
        if log_every < 1:
            raise OptionError(f"log_every must be at least 1, got {log_every}")
        self.subspace = subspace
        self.task_id = task_id
        self.lr = lr
        self.num_expand = num_expand
        self.log_every = log_every
        self.save_on_end = save_on_end
        self.detach_on_end = detach_on_end
        self.trainer = SubspaceTrainer(
            subspace, task_id, 1e-3 if lr is None else lr, num_expand=num_expand
        )
        self._layers: list[AdaptedLayer] = []
        self._hooks: list[Any] = []
        self._heads: HeadSwitch | None = None
        self._frozen: list[nn.Parameter] = []

    # --- events of the Trainer --------------------------------------------------------------------

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the task into the model, before the Trainer makes its optimiser."""
        self._attach(kwargs["model"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that the Trainer trains the task, and set the learning rate."""
        if not self._hooks and kwargs.get("model") is not None:
            self._attach(kwargs["model"])
        optimizer = kwargs.get("optimizer")
        groups = [] if optimizer is None else optimizer.param_groups
        trained = {id(parameter) for group in groups for parameter in group["params"]}
        if not all(id(parameter) in trained for parameter in self.trainer.params.values()):
            self.detach()
            raise OptionError(
                "the Trainer's optimiser does not have the task's parameters; give the callback to "
                "Trainer(callbacks=[...]), no optimiser of your own, and use neither FSDP nor DeepSpeed"
            )
        assert optimizer is not None
        self.trainer.optimizer = optimizer
        if self.lr is not None:
            _set_learning_rate(self.lr, groups, kwargs.get("lr_scheduler"))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step without any gradient would train nothing and say nothing."""
        if all(parameter.grad is None for parameter in self.trainer.params.values()):
            raise OptionError(
                "no gradient reaches the task; with re-entrant gradient checkpointing call "
                "model.enable_input_require_grads() first"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Count the step; ask for a log every ``log_every`` steps."""
        self.trainer.step_count += 1
        if self.trainer.step_count % self.log_every == 0:
            control.should_log = True
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add the task's figures to a log of the training."""
        if logs is None or "loss" not in logs or self.trainer.step_count % self.log_every:
            return
        figures = {
            "vlora/loadings_norm": self._norm(),
            "vlora/trainable_params": self.trainer.num_trainable_params,
            "vlora/step": self.trainer.step_count,
        }
        logs.update(figures)
        # The Trainer put a copy into its history before it called.
        state.log_history[-1].update(figures)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the task out of the model and write it back."""
        if self.detach_on_end:
            self.detach()
        if self.save_on_end:
            self.trainer.write_back()

    # --- the model --------------------------------------------------------------------------------

    def detach(self) -> None:
        """Take the task's parameters and hooks out of the model and thaw it; safe to repeat."""
        for hook in self._hooks:
            hook.remove()
        for layer in self._layers:
            for name in self.trainer.own_params(layer.name):
                delattr(layer.module, _PREFIX + name)
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        if self._heads is not None:
            self._heads.show(())
        self._hooks, self._layers, self._frozen, self._heads = [], [], [], None

    def _attach(self, model: nn.Module) -> None:
        layers = self.trainer.layers_in(model)
        heads = self.trainer.show_heads(model)
        self._frozen = [p for p in model.parameters() if p.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        for layer in layers:
            for name, parameter in self.trainer.own_params(layer.name).items():
                parameter.data = parameter.data.to(layer.device)
                layer.module.register_parameter(_PREFIX + name, parameter)
        self._layers = layers
        self._heads = heads
        self._hooks = [layer.install() for layer in layers]

    def _norm(self) -> float:
        squares = (float(p.detach().square().sum()) for p in self.trainer.params.values())
        return float(sum(squares) ** 0.5)


def _set_learning_rate(lr: float, groups: list[dict[str, Any]], scheduler: Any) -> None:
    """Make ``lr`` the peak of the Trainer's schedule, wherever in it training begins."""
    for group in groups:
        peak = group.get("initial_lr", group["lr"])
        group["lr"] = lr * (group["lr"] / peak if peak else 1.0)
        group["initial_lr"] = lr
    scheduler = getattr(scheduler, "scheduler", scheduler)
    if hasattr(scheduler, "base_lrs"):
        scheduler.base_lrs = [lr] * len(groups)
        # What the Trainer logs at its first step.
        scheduler._last_lr = [group["lr"] for group in groups]
