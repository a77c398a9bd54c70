"""Every error this package raises on purpose. The message says what happened and what to do next.

TideError
├── SettingsError            a settings file, recipe or engine.toml is wrong
├── InvalidRequest           a request that can't be served as it stands          (HTTP 400)
│   └── PromptTooLong
├── QueueFull                more requests than the queue holds                   (HTTP 503)
├── EngineClosed             the engine is shutting down                          (HTTP 503)
├── CheckpointError          a draft or target folder is missing or malformed
│   └── EngineMismatch       it belongs to another target or engine
├── LakeError                the signal lake can't be read or written
│   ├── LakeAway             its storage does not answer, or not now: later it may
│   ├── CorruptShard
│   └── NotEnoughSignals
├── TrainingFailed           training stopped: NaN, exploding loss, no time left
├── RegistryError            MLflow refused, or gave back other bytes
│   └── RegistryAway         it does not answer, or not now: later may do
├── BuildError               a build is missing, incomplete or altered
│   ├── DigestMismatch       its bytes are not those that were recorded
│   └── RestartNeeded        it is whole, and only a new server can serve it
├── DeploymentConflict       somebody else wrote the deployment record first
├── RolloutRefused           pinned, held, or no replica to watch: the record stays as it is
├── GateNotPassed            promotion was asked for without a passing verdict
├── NothingToRollBack        the deployment record holds no earlier state
└── StackError               a local service did not start, stop or answer
    └── PortInUse
"""

from __future__ import annotations


class TideError(Exception):
    """Base of the family."""


class SettingsError(TideError): ...


class InvalidRequest(TideError): ...


class PromptTooLong(InvalidRequest): ...


class QueueFull(TideError): ...


class EngineClosed(TideError): ...


class CheckpointError(TideError): ...


class EngineMismatch(CheckpointError): ...


class LakeError(TideError): ...


class LakeAway(LakeError): ...


class CorruptShard(LakeError): ...


class NotEnoughSignals(LakeError): ...


class TrainingFailed(TideError): ...


class RegistryError(TideError): ...


class RegistryAway(RegistryError): ...


class BuildError(TideError): ...


class DigestMismatch(BuildError): ...


class RestartNeeded(BuildError): ...


class DeploymentConflict(TideError): ...


class RolloutRefused(TideError): ...


class GateNotPassed(TideError): ...


class NothingToRollBack(TideError): ...


class StackError(TideError): ...


class PortInUse(StackError): ...
