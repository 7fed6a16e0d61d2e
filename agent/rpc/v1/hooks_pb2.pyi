from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class HookPhase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    HOOK_PHASE_UNSPECIFIED: _ClassVar[HookPhase]
    HOOK_PHASE_PRE: _ClassVar[HookPhase]
    HOOK_PHASE_POST: _ClassVar[HookPhase]

class HookOutcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    HOOK_OUTCOME_UNSPECIFIED: _ClassVar[HookOutcome]
    HOOK_OUTCOME_CAPTURED: _ClassVar[HookOutcome]
    HOOK_OUTCOME_COMMITTED: _ClassVar[HookOutcome]
    HOOK_OUTCOME_ABORTED: _ClassVar[HookOutcome]
    HOOK_OUTCOME_RESTORED: _ClassVar[HookOutcome]
    HOOK_OUTCOME_UNKNOWN: _ClassVar[HookOutcome]
HOOK_PHASE_UNSPECIFIED: HookPhase
HOOK_PHASE_PRE: HookPhase
HOOK_PHASE_POST: HookPhase
HOOK_OUTCOME_UNSPECIFIED: HookOutcome
HOOK_OUTCOME_CAPTURED: HookOutcome
HOOK_OUTCOME_COMMITTED: HookOutcome
HOOK_OUTCOME_ABORTED: HookOutcome
HOOK_OUTCOME_RESTORED: HookOutcome
HOOK_OUTCOME_UNKNOWN: HookOutcome

class HookRequest(_message.Message):
    __slots__ = ("hook", "phase", "outcome", "image", "namespace", "now", "was")
    HOOK_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    NOW_FIELD_NUMBER: _ClassVar[int]
    WAS_FIELD_NUMBER: _ClassVar[int]
    hook: str
    phase: HookPhase
    outcome: HookOutcome
    image: str
    namespace: str
    now: HookPlace
    was: HookPlace
    def __init__(self, hook: _Optional[str] = ..., phase: _Optional[_Union[HookPhase, str]] = ..., outcome: _Optional[_Union[HookOutcome, str]] = ..., image: _Optional[str] = ..., namespace: _Optional[str] = ..., now: _Optional[_Union[HookPlace, _Mapping]] = ..., was: _Optional[_Union[HookPlace, _Mapping]] = ...) -> None: ...

class HookPlace(_message.Message):
    __slots__ = ("pod", "pod_uid", "node", "addresses")
    POD_FIELD_NUMBER: _ClassVar[int]
    POD_UID_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    pod: str
    pod_uid: str
    node: str
    addresses: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, pod: _Optional[str] = ..., pod_uid: _Optional[str] = ..., node: _Optional[str] = ..., addresses: _Optional[_Iterable[str]] = ...) -> None: ...

class HookResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
