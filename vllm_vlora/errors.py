"""Exceptions that a user may see. Each message is one line and says what to do next.

A message may quote names that somebody else gave, and URLs with keys in them; its text is therefore as
``wording.shown`` and ``wording.without_secrets`` show it.

Some are built-in errors as well: code written for vlora catches ``KeyError``, ``ValueError`` and
``RuntimeError``.
"""

from vllm_vlora.wording import shown, without_secrets


class VLoRAError(Exception):
    """Base of every error this package raises for bad input or a bad environment.

    Examples:
        >>> try:
        ...     Checkpoint.open(folder)
        ... except VLoRAError as error:
        ...     print(type(error).__name__)
        CheckpointError
    """

    def __str__(self) -> str:
        # KeyError, which one error below is too, would show its message in quotes.
        return shown(without_secrets(" ".join(Exception.__str__(self).splitlines())))


class AdapterError(VLoRAError, ValueError):
    """An adapter cannot be read, or uses a feature that has no exact low-rank form."""


class TaskIdError(VLoRAError, ValueError):
    """A task id is empty, too long or holds control characters, or another task has it."""


class CheckpointError(VLoRAError):
    """A checkpoint cannot be read, is damaged or contradicts itself."""


class CheckpointVersionError(CheckpointError):
    """The checkpoint was written by a newer format than this version reads."""


class CheckpointReplacedError(CheckpointError):
    """Another run has put a new checkpoint in the place of one while it was read; begin again."""


class TaskNotFoundError(CheckpointError, KeyError):
    """The checkpoint or the subspace holds no task of that name."""


class BlendError(VLoRAError, ValueError):
    """A name of a blend or of an alias cannot be read, or what it names cannot be blended."""


class OutputError(VLoRAError):
    """The output exists already, is not ours to replace, or cannot be written."""


class LockedError(OutputError):
    """Another run writes there."""


class OptionError(VLoRAError, ValueError):
    """An option is out of range, unknown, or contradicts another one."""


class BudgetError(VLoRAError):
    """No allowed representation meets the asked size or error."""


class ModelStateError(VLoRAError, RuntimeError):
    """A model cannot do this now: a task is merged into its weights, it is quantised or compiled, or an
    engine would lose the tasks that it serves.
    """


class ModelMismatchError(VLoRAError):
    """The served model lacks a module of the checkpoint, or has it in another shape."""


class MemoryBudgetError(VLoRAError):
    """A task that is not loaded yet would take more memory than such tasks may."""


class TaskLoadError(VLoRAError, ValueError):
    """The engine could not load the task of a request; the message has the engine's reason."""


class TaskBusyError(VLoRAError):
    """As many requests of a task wait as may wait; ask again later. HTTP status 429."""


class IncompatibleVLLMError(VLoRAError):
    """The installed vLLM is not one this plugin was checked on."""


class ServerError(VLoRAError):
    """A running server does not answer, or not as one with this plugin does."""


class SettingError(VLoRAError):
    """An environment variable of the plugin holds a value that it cannot have."""


class DataError(VLoRAError):
    """Text for calibration or evaluation, or a calibration, cannot be read or does not fit."""
