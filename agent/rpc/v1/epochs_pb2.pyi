from agent.rpc.v1 import node_pb2 as _node_pb2
from google.protobuf import struct_pb2 as _struct_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Course(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    COURSE_UNSPECIFIED: _ClassVar[Course]
    COURSE_LEAVE_RUNNING: _ClassVar[Course]
    COURSE_EVACUATE: _ClassVar[Course]
    COURSE_RESTORE: _ClassVar[Course]
    COURSE_LEAVE_RUNNING_HELD: _ClassVar[Course]

class Step(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STEP_UNSPECIFIED: _ClassVar[Step]
    STEP_PREPARE: _ClassVar[Step]
    STEP_QUIESCE: _ClassVar[Step]
    STEP_FREEZE: _ClassVar[Step]
    STEP_HOLD: _ClassVar[Step]
    STEP_CAPTURE: _ClassVar[Step]
    STEP_RELEASE: _ClassVar[Step]
    STEP_RESUME: _ClassVar[Step]
    STEP_PERSIST: _ClassVar[Step]
    STEP_END: _ClassVar[Step]
    STEP_FINISH: _ClassVar[Step]
    STEP_ABORT: _ClassVar[Step]
    STEP_FILL: _ClassVar[Step]
    STEP_STAND: _ClassVar[Step]
    STEP_RUN: _ClassVar[Step]

class Decision(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DECISION_UNSPECIFIED: _ClassVar[Decision]
    DECISION_COMMITTED: _ClassVar[Decision]
    DECISION_ABANDONED: _ClassVar[Decision]
COURSE_UNSPECIFIED: Course
COURSE_LEAVE_RUNNING: Course
COURSE_EVACUATE: Course
COURSE_RESTORE: Course
COURSE_LEAVE_RUNNING_HELD: Course
STEP_UNSPECIFIED: Step
STEP_PREPARE: Step
STEP_QUIESCE: Step
STEP_FREEZE: Step
STEP_HOLD: Step
STEP_CAPTURE: Step
STEP_RELEASE: Step
STEP_RESUME: Step
STEP_PERSIST: Step
STEP_END: Step
STEP_FINISH: Step
STEP_ABORT: Step
STEP_FILL: Step
STEP_STAND: Step
STEP_RUN: Step
DECISION_UNSPECIFIED: Decision
DECISION_COMMITTED: Decision
DECISION_ABANDONED: Decision

class NewEpochRequest(_message.Message):
    __slots__ = ("namespace", "group", "storage")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    STORAGE_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    group: str
    storage: str
    def __init__(self, namespace: _Optional[str] = ..., group: _Optional[str] = ..., storage: _Optional[str] = ...) -> None: ...

class NewEpochResponse(_message.Message):
    __slots__ = ("epoch", "storage")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STORAGE_FIELD_NUMBER: _ClassVar[int]
    epoch: str
    storage: str
    def __init__(self, epoch: _Optional[str] = ..., storage: _Optional[str] = ...) -> None: ...

class TakePartRequest(_message.Message):
    __slots__ = ("namespace", "group", "epoch", "storage", "course", "pod", "pod_uid", "containers", "member", "token", "step", "wait_s", "deadline_s", "attempt", "leads", "within", "engine")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STORAGE_FIELD_NUMBER: _ClassVar[int]
    COURSE_FIELD_NUMBER: _ClassVar[int]
    POD_FIELD_NUMBER: _ClassVar[int]
    POD_UID_FIELD_NUMBER: _ClassVar[int]
    CONTAINERS_FIELD_NUMBER: _ClassVar[int]
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    LEADS_FIELD_NUMBER: _ClassVar[int]
    WITHIN_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    group: str
    epoch: str
    storage: str
    course: Course
    pod: str
    pod_uid: str
    containers: _containers.RepeatedScalarFieldContainer[str]
    member: str
    token: int
    step: Step
    wait_s: float
    deadline_s: float
    attempt: Attempt
    leads: bool
    within: _containers.RepeatedScalarFieldContainer[str]
    engine: _node_pb2.Engine
    def __init__(self, namespace: _Optional[str] = ..., group: _Optional[str] = ..., epoch: _Optional[str] = ..., storage: _Optional[str] = ..., course: _Optional[_Union[Course, str]] = ..., pod: _Optional[str] = ..., pod_uid: _Optional[str] = ..., containers: _Optional[_Iterable[str]] = ..., member: _Optional[str] = ..., token: _Optional[int] = ..., step: _Optional[_Union[Step, str]] = ..., wait_s: _Optional[float] = ..., deadline_s: _Optional[float] = ..., attempt: _Optional[_Union[Attempt, _Mapping]] = ..., leads: _Optional[bool] = ..., within: _Optional[_Iterable[str]] = ..., engine: _Optional[_Union[_node_pb2.Engine, str]] = ...) -> None: ...

class Attempt(_message.Message):
    __slots__ = ("id", "addresses", "again")
    class AddressesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    AGAIN_FIELD_NUMBER: _ClassVar[int]
    id: str
    addresses: _containers.ScalarMap[str, str]
    again: bool
    def __init__(self, id: _Optional[str] = ..., addresses: _Optional[_Mapping[str, str]] = ..., again: _Optional[bool] = ...) -> None: ...

class TakePartResponse(_message.Message):
    __slots__ = ("answered", "problem", "error", "contribution", "lost", "times")
    ANSWERED_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTION_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    TIMES_FIELD_NUMBER: _ClassVar[int]
    answered: bool
    problem: str
    error: _node_pb2.Error
    contribution: bytes
    lost: _containers.RepeatedScalarFieldContainer[str]
    times: Times
    def __init__(self, answered: _Optional[bool] = ..., problem: _Optional[str] = ..., error: _Optional[_Union[_node_pb2.Error, _Mapping]] = ..., contribution: _Optional[bytes] = ..., lost: _Optional[_Iterable[str]] = ..., times: _Optional[_Union[Times, _Mapping]] = ...) -> None: ...

class Times(_message.Message):
    __slots__ = ("heard_s", "answered_s", "began_s", "done_s")
    HEARD_S_FIELD_NUMBER: _ClassVar[int]
    ANSWERED_S_FIELD_NUMBER: _ClassVar[int]
    BEGAN_S_FIELD_NUMBER: _ClassVar[int]
    DONE_S_FIELD_NUMBER: _ClassVar[int]
    heard_s: float
    answered_s: float
    began_s: float
    done_s: float
    def __init__(self, heard_s: _Optional[float] = ..., answered_s: _Optional[float] = ..., began_s: _Optional[float] = ..., done_s: _Optional[float] = ...) -> None: ...

class DecideEpochRequest(_message.Message):
    __slots__ = ("namespace", "group", "epoch", "storage", "wish", "contributions", "facts", "unfinished")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STORAGE_FIELD_NUMBER: _ClassVar[int]
    WISH_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTIONS_FIELD_NUMBER: _ClassVar[int]
    FACTS_FIELD_NUMBER: _ClassVar[int]
    UNFINISHED_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    group: str
    epoch: str
    storage: str
    wish: Decision
    contributions: _containers.RepeatedScalarFieldContainer[bytes]
    facts: _struct_pb2.Struct
    unfinished: bool
    def __init__(self, namespace: _Optional[str] = ..., group: _Optional[str] = ..., epoch: _Optional[str] = ..., storage: _Optional[str] = ..., wish: _Optional[_Union[Decision, str]] = ..., contributions: _Optional[_Iterable[bytes]] = ..., facts: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ..., unfinished: _Optional[bool] = ...) -> None: ...

class DecideEpochResponse(_message.Message):
    __slots__ = ("decision", "image", "connections", "leaving", "members", "hook_problems", "engine")
    DECISION_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    CONNECTIONS_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    HOOK_PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    decision: Decision
    image: _node_pb2.Image
    connections: int
    leaving: _containers.RepeatedCompositeFieldContainer[Leaving]
    members: _containers.RepeatedCompositeFieldContainer[_node_pb2.MemberOutcome]
    hook_problems: _containers.RepeatedScalarFieldContainer[str]
    engine: str
    def __init__(self, decision: _Optional[_Union[Decision, str]] = ..., image: _Optional[_Union[_node_pb2.Image, _Mapping]] = ..., connections: _Optional[int] = ..., leaving: _Optional[_Iterable[_Union[Leaving, _Mapping]]] = ..., members: _Optional[_Iterable[_Union[_node_pb2.MemberOutcome, _Mapping]]] = ..., hook_problems: _Optional[_Iterable[str]] = ..., engine: _Optional[str] = ...) -> None: ...

class DecideRestoreRequest(_message.Message):
    __slots__ = ("namespace", "group", "epoch", "storage", "attempt", "wish", "pod_uids")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STORAGE_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    WISH_FIELD_NUMBER: _ClassVar[int]
    POD_UIDS_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    group: str
    epoch: str
    storage: str
    attempt: Attempt
    wish: Decision
    pod_uids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, namespace: _Optional[str] = ..., group: _Optional[str] = ..., epoch: _Optional[str] = ..., storage: _Optional[str] = ..., attempt: _Optional[_Union[Attempt, _Mapping]] = ..., wish: _Optional[_Union[Decision, str]] = ..., pod_uids: _Optional[_Iterable[str]] = ...) -> None: ...

class DecideRestoreResponse(_message.Message):
    __slots__ = ("decision",)
    DECISION_FIELD_NUMBER: _ClassVar[int]
    decision: Decision
    def __init__(self, decision: _Optional[_Union[Decision, str]] = ...) -> None: ...

class Leaving(_message.Message):
    __slots__ = ("pod_uid", "local", "remote")
    POD_UID_FIELD_NUMBER: _ClassVar[int]
    LOCAL_FIELD_NUMBER: _ClassVar[int]
    REMOTE_FIELD_NUMBER: _ClassVar[int]
    pod_uid: str
    local: str
    remote: str
    def __init__(self, pod_uid: _Optional[str] = ..., local: _Optional[str] = ..., remote: _Optional[str] = ...) -> None: ...
