import datetime

from agent.rpc.v1 import node_pb2 as _node_pb2
from google.protobuf import struct_pb2 as _struct_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WhenBusy(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WHEN_BUSY_UNSPECIFIED: _ClassVar[WhenBusy]
    WHEN_BUSY_REFUSE: _ClassVar[WhenBusy]
    WHEN_BUSY_WAIT: _ClassVar[WhenBusy]

class OperationKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OPERATION_KIND_UNSPECIFIED: _ClassVar[OperationKind]
    OPERATION_KIND_EPOCH: _ClassVar[OperationKind]
    OPERATION_KIND_RESTORE: _ClassVar[OperationKind]
    OPERATION_KIND_MIGRATE: _ClassVar[OperationKind]

class OperationState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OPERATION_STATE_UNSPECIFIED: _ClassVar[OperationState]
    OPERATION_STATE_QUEUED: _ClassVar[OperationState]
    OPERATION_STATE_RUNNING: _ClassVar[OperationState]
    OPERATION_STATE_SUCCEEDED: _ClassVar[OperationState]
    OPERATION_STATE_FAILED: _ClassVar[OperationState]
    OPERATION_STATE_CANCELLED: _ClassVar[OperationState]
WHEN_BUSY_UNSPECIFIED: WhenBusy
WHEN_BUSY_REFUSE: WhenBusy
WHEN_BUSY_WAIT: WhenBusy
OPERATION_KIND_UNSPECIFIED: OperationKind
OPERATION_KIND_EPOCH: OperationKind
OPERATION_KIND_RESTORE: OperationKind
OPERATION_KIND_MIGRATE: OperationKind
OPERATION_STATE_UNSPECIFIED: OperationState
OPERATION_STATE_QUEUED: OperationState
OPERATION_STATE_RUNNING: OperationState
OPERATION_STATE_SUCCEEDED: OperationState
OPERATION_STATE_FAILED: OperationState
OPERATION_STATE_CANCELLED: OperationState

class Target(_message.Message):
    __slots__ = ("jobset", "selector", "followed")
    JOBSET_FIELD_NUMBER: _ClassVar[int]
    SELECTOR_FIELD_NUMBER: _ClassVar[int]
    FOLLOWED_FIELD_NUMBER: _ClassVar[int]
    jobset: str
    selector: Selector
    followed: str
    def __init__(self, jobset: _Optional[str] = ..., selector: _Optional[_Union[Selector, _Mapping]] = ..., followed: _Optional[str] = ...) -> None: ...

class Selector(_message.Message):
    __slots__ = ("labels", "group")
    LABELS_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    labels: str
    group: str
    def __init__(self, labels: _Optional[str] = ..., group: _Optional[str] = ...) -> None: ...

class Asking(_message.Message):
    __slots__ = ("namespace", "idempotency_key", "when_busy", "deadline_s")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    WHEN_BUSY_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    idempotency_key: str
    when_busy: WhenBusy
    deadline_s: float
    def __init__(self, namespace: _Optional[str] = ..., idempotency_key: _Optional[str] = ..., when_busy: _Optional[_Union[WhenBusy, str]] = ..., deadline_s: _Optional[float] = ...) -> None: ...

class CreateEpochRequest(_message.Message):
    __slots__ = ("asking", "target", "storage", "stop")
    ASKING_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    STORAGE_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    asking: Asking
    target: Target
    storage: str
    stop: bool
    def __init__(self, asking: _Optional[_Union[Asking, _Mapping]] = ..., target: _Optional[_Union[Target, _Mapping]] = ..., storage: _Optional[str] = ..., stop: _Optional[bool] = ...) -> None: ...

class RestoreGroupRequest(_message.Message):
    __slots__ = ("asking", "target", "epoch", "storage", "nodes", "replace", "again")
    ASKING_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STORAGE_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    REPLACE_FIELD_NUMBER: _ClassVar[int]
    AGAIN_FIELD_NUMBER: _ClassVar[int]
    asking: Asking
    target: Target
    epoch: str
    storage: str
    nodes: _containers.RepeatedScalarFieldContainer[str]
    replace: bool
    again: bool
    def __init__(self, asking: _Optional[_Union[Asking, _Mapping]] = ..., target: _Optional[_Union[Target, _Mapping]] = ..., epoch: _Optional[str] = ..., storage: _Optional[str] = ..., nodes: _Optional[_Iterable[str]] = ..., replace: _Optional[bool] = ..., again: _Optional[bool] = ...) -> None: ...

class MigrateRequest(_message.Message):
    __slots__ = ("asking", "jobset", "nodes")
    ASKING_FIELD_NUMBER: _ClassVar[int]
    JOBSET_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    asking: Asking
    jobset: str
    nodes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, asking: _Optional[_Union[Asking, _Mapping]] = ..., jobset: _Optional[str] = ..., nodes: _Optional[_Iterable[str]] = ...) -> None: ...

class Operation(_message.Message):
    __slots__ = ("id", "namespace", "kind", "group", "caller", "state", "step", "revision", "created", "ended", "error", "takeovers", "image", "figures", "pods", "cancelling")
    ID_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    CALLER_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    TAKEOVERS_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    FIGURES_FIELD_NUMBER: _ClassVar[int]
    PODS_FIELD_NUMBER: _ClassVar[int]
    CANCELLING_FIELD_NUMBER: _ClassVar[int]
    id: str
    namespace: str
    kind: OperationKind
    group: str
    caller: str
    state: OperationState
    step: str
    revision: int
    created: _timestamp_pb2.Timestamp
    ended: _timestamp_pb2.Timestamp
    error: _node_pb2.Error
    takeovers: int
    image: _node_pb2.Image
    figures: EpochFigures
    pods: _containers.RepeatedCompositeFieldContainer[RestoredPod]
    cancelling: bool
    def __init__(self, id: _Optional[str] = ..., namespace: _Optional[str] = ..., kind: _Optional[_Union[OperationKind, str]] = ..., group: _Optional[str] = ..., caller: _Optional[str] = ..., state: _Optional[_Union[OperationState, str]] = ..., step: _Optional[str] = ..., revision: _Optional[int] = ..., created: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., ended: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., error: _Optional[_Union[_node_pb2.Error, _Mapping]] = ..., takeovers: _Optional[int] = ..., image: _Optional[_Union[_node_pb2.Image, _Mapping]] = ..., figures: _Optional[_Union[EpochFigures, _Mapping]] = ..., pods: _Optional[_Iterable[_Union[RestoredPod, _Mapping]]] = ..., cancelling: _Optional[bool] = ...) -> None: ...

class EpochFigures(_message.Message):
    __slots__ = ("stop_s", "durable_s", "members", "connections", "leaving")
    STOP_S_FIELD_NUMBER: _ClassVar[int]
    DURABLE_S_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    CONNECTIONS_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    stop_s: float
    durable_s: float
    members: _containers.RepeatedCompositeFieldContainer[_node_pb2.MemberOutcome]
    connections: int
    leaving: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, stop_s: _Optional[float] = ..., durable_s: _Optional[float] = ..., members: _Optional[_Iterable[_Union[_node_pb2.MemberOutcome, _Mapping]]] = ..., connections: _Optional[int] = ..., leaving: _Optional[_Iterable[str]] = ...) -> None: ...

class RestoredPod(_message.Message):
    __slots__ = ("identity", "was", "now", "lost")
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    WAS_FIELD_NUMBER: _ClassVar[int]
    NOW_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    identity: str
    was: _node_pb2.Placement
    now: _node_pb2.Placement
    lost: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, identity: _Optional[str] = ..., was: _Optional[_Union[_node_pb2.Placement, _Mapping]] = ..., now: _Optional[_Union[_node_pb2.Placement, _Mapping]] = ..., lost: _Optional[_Iterable[str]] = ...) -> None: ...

class GetOperationRequest(_message.Message):
    __slots__ = ("namespace", "id")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    id: str
    def __init__(self, namespace: _Optional[str] = ..., id: _Optional[str] = ...) -> None: ...

class WatchOperationRequest(_message.Message):
    __slots__ = ("namespace", "id")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    id: str
    def __init__(self, namespace: _Optional[str] = ..., id: _Optional[str] = ...) -> None: ...

class CancelOperationRequest(_message.Message):
    __slots__ = ("namespace", "id")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    id: str
    def __init__(self, namespace: _Optional[str] = ..., id: _Optional[str] = ...) -> None: ...

class ListOperationsRequest(_message.Message):
    __slots__ = ("namespace", "group", "page_size", "page_token")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    group: str
    page_size: int
    page_token: str
    def __init__(self, namespace: _Optional[str] = ..., group: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListOperationsResponse(_message.Message):
    __slots__ = ("operations", "next_page_token")
    OPERATIONS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    operations: _containers.RepeatedCompositeFieldContainer[Operation]
    next_page_token: str
    def __init__(self, operations: _Optional[_Iterable[_Union[Operation, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class PlanEpochRequest(_message.Message):
    __slots__ = ("namespace", "target")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    target: Target
    def __init__(self, namespace: _Optional[str] = ..., target: _Optional[_Union[Target, _Mapping]] = ...) -> None: ...

class PlanEpochResponse(_message.Message):
    __slots__ = ("members", "obstacles")
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    OBSTACLES_FIELD_NUMBER: _ClassVar[int]
    members: _containers.RepeatedCompositeFieldContainer[MemberPlan]
    obstacles: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, members: _Optional[_Iterable[_Union[MemberPlan, _Mapping]]] = ..., obstacles: _Optional[_Iterable[str]] = ...) -> None: ...

class MemberPlan(_message.Message):
    __slots__ = ("identity", "pod", "node", "plan")
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    POD_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    identity: str
    pod: str
    node: str
    plan: _struct_pb2.Struct
    def __init__(self, identity: _Optional[str] = ..., pod: _Optional[str] = ..., node: _Optional[str] = ..., plan: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ...) -> None: ...

class ListGroupImagesRequest(_message.Message):
    __slots__ = ("namespace", "group", "storage", "page_size", "page_token")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    STORAGE_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    group: str
    storage: str
    page_size: int
    page_token: str
    def __init__(self, namespace: _Optional[str] = ..., group: _Optional[str] = ..., storage: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListGroupImagesResponse(_message.Message):
    __slots__ = ("images", "next_page_token", "unread")
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    UNREAD_FIELD_NUMBER: _ClassVar[int]
    images: _containers.RepeatedCompositeFieldContainer[_node_pb2.Image]
    next_page_token: str
    unread: _containers.RepeatedCompositeFieldContainer[_node_pb2.UnreadStorage]
    def __init__(self, images: _Optional[_Iterable[_Union[_node_pb2.Image, _Mapping]]] = ..., next_page_token: _Optional[str] = ..., unread: _Optional[_Iterable[_Union[_node_pb2.UnreadStorage, _Mapping]]] = ...) -> None: ...
