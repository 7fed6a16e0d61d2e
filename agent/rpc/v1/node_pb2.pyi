import datetime

from google.protobuf import struct_pb2 as _struct_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Engine(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ENGINE_UNSPECIFIED: _ClassVar[Engine]
    ENGINE_CONTAINER: _ClassVar[Engine]
    ENGINE_KUBELET: _ClassVar[Engine]
ENGINE_UNSPECIFIED: Engine
ENGINE_CONTAINER: Engine
ENGINE_KUBELET: Engine

class DumpRequest(_message.Message):
    __slots__ = ("namespace", "pod", "pod_uid", "containers", "engine", "stop", "deadline_s")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    POD_FIELD_NUMBER: _ClassVar[int]
    POD_UID_FIELD_NUMBER: _ClassVar[int]
    CONTAINERS_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    pod: str
    pod_uid: str
    containers: _containers.RepeatedScalarFieldContainer[str]
    engine: Engine
    stop: bool
    deadline_s: float
    def __init__(self, namespace: _Optional[str] = ..., pod: _Optional[str] = ..., pod_uid: _Optional[str] = ..., containers: _Optional[_Iterable[str]] = ..., engine: _Optional[_Union[Engine, str]] = ..., stop: _Optional[bool] = ..., deadline_s: _Optional[float] = ...) -> None: ...

class DumpEvent(_message.Message):
    __slots__ = ("progress", "outcome")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    progress: DumpProgress
    outcome: DumpOutcome
    def __init__(self, progress: _Optional[_Union[DumpProgress, _Mapping]] = ..., outcome: _Optional[_Union[DumpOutcome, _Mapping]] = ...) -> None: ...

class DumpProgress(_message.Message):
    __slots__ = ("phase", "raw_bytes")
    PHASE_FIELD_NUMBER: _ClassVar[int]
    RAW_BYTES_FIELD_NUMBER: _ClassVar[int]
    phase: str
    raw_bytes: int
    def __init__(self, phase: _Optional[str] = ..., raw_bytes: _Optional[int] = ...) -> None: ...

class DumpOutcome(_message.Message):
    __slots__ = ("image", "stop_s", "durable_s", "engine", "stopped", "members", "pod_template_json", "hook_problems")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    STOP_S_FIELD_NUMBER: _ClassVar[int]
    DURABLE_S_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    STOPPED_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    POD_TEMPLATE_JSON_FIELD_NUMBER: _ClassVar[int]
    HOOK_PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    image: Image
    stop_s: float
    durable_s: float
    engine: Engine
    stopped: bool
    members: _containers.RepeatedCompositeFieldContainer[MemberOutcome]
    pod_template_json: str
    hook_problems: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, image: _Optional[_Union[Image, _Mapping]] = ..., stop_s: _Optional[float] = ..., durable_s: _Optional[float] = ..., engine: _Optional[_Union[Engine, str]] = ..., stopped: _Optional[bool] = ..., members: _Optional[_Iterable[_Union[MemberOutcome, _Mapping]]] = ..., pod_template_json: _Optional[str] = ..., hook_problems: _Optional[_Iterable[str]] = ...) -> None: ...

class MemberOutcome(_message.Message):
    __slots__ = ("name", "stop_s", "freeze_s", "raw_bytes", "processes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    STOP_S_FIELD_NUMBER: _ClassVar[int]
    FREEZE_S_FIELD_NUMBER: _ClassVar[int]
    RAW_BYTES_FIELD_NUMBER: _ClassVar[int]
    PROCESSES_FIELD_NUMBER: _ClassVar[int]
    name: str
    stop_s: float
    freeze_s: float
    raw_bytes: int
    processes: int
    def __init__(self, name: _Optional[str] = ..., stop_s: _Optional[float] = ..., freeze_s: _Optional[float] = ..., raw_bytes: _Optional[int] = ..., processes: _Optional[int] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("namespace", "pod", "pod_uid", "containers", "every_s", "count", "deadline_s")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    POD_FIELD_NUMBER: _ClassVar[int]
    POD_UID_FIELD_NUMBER: _ClassVar[int]
    CONTAINERS_FIELD_NUMBER: _ClassVar[int]
    EVERY_S_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    pod: str
    pod_uid: str
    containers: _containers.RepeatedScalarFieldContainer[str]
    every_s: float
    count: int
    deadline_s: float
    def __init__(self, namespace: _Optional[str] = ..., pod: _Optional[str] = ..., pod_uid: _Optional[str] = ..., containers: _Optional[_Iterable[str]] = ..., every_s: _Optional[float] = ..., count: _Optional[int] = ..., deadline_s: _Optional[float] = ...) -> None: ...

class WatchEvent(_message.Message):
    __slots__ = ("epoch", "failed", "late", "outcome")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    LATE_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    epoch: DumpOutcome
    failed: Error
    late: WatchLate
    outcome: WatchOutcome
    def __init__(self, epoch: _Optional[_Union[DumpOutcome, _Mapping]] = ..., failed: _Optional[_Union[Error, _Mapping]] = ..., late: _Optional[_Union[WatchLate, _Mapping]] = ..., outcome: _Optional[_Union[WatchOutcome, _Mapping]] = ...) -> None: ...

class WatchLate(_message.Message):
    __slots__ = ("took_s", "pause_s")
    TOOK_S_FIELD_NUMBER: _ClassVar[int]
    PAUSE_S_FIELD_NUMBER: _ClassVar[int]
    took_s: float
    pause_s: float
    def __init__(self, took_s: _Optional[float] = ..., pause_s: _Optional[float] = ...) -> None: ...

class WatchOutcome(_message.Message):
    __slots__ = ("epochs", "failures", "last_failed", "ended")
    EPOCHS_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    LAST_FAILED_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    epochs: int
    failures: int
    last_failed: Error
    ended: bool
    def __init__(self, epochs: _Optional[int] = ..., failures: _Optional[int] = ..., last_failed: _Optional[_Union[Error, _Mapping]] = ..., ended: _Optional[bool] = ...) -> None: ...

class RestoreRequest(_message.Message):
    __slots__ = ("namespace", "image", "pod", "pod_uid", "again", "deadline_s", "storage")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    POD_FIELD_NUMBER: _ClassVar[int]
    POD_UID_FIELD_NUMBER: _ClassVar[int]
    AGAIN_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    STORAGE_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    image: str
    pod: str
    pod_uid: str
    again: bool
    deadline_s: float
    storage: str
    def __init__(self, namespace: _Optional[str] = ..., image: _Optional[str] = ..., pod: _Optional[str] = ..., pod_uid: _Optional[str] = ..., again: _Optional[bool] = ..., deadline_s: _Optional[float] = ..., storage: _Optional[str] = ...) -> None: ...

class RestoreEvent(_message.Message):
    __slots__ = ("progress", "outcome")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    progress: RestoreProgress
    outcome: RestoreOutcome
    def __init__(self, progress: _Optional[_Union[RestoreProgress, _Mapping]] = ..., outcome: _Optional[_Union[RestoreOutcome, _Mapping]] = ...) -> None: ...

class RestoreProgress(_message.Message):
    __slots__ = ("phase",)
    PHASE_FIELD_NUMBER: _ClassVar[int]
    phase: str
    def __init__(self, phase: _Optional[str] = ...) -> None: ...

class RestoreOutcome(_message.Message):
    __slots__ = ("image", "waited_s", "verified_s", "running_s", "was", "now", "hook_problems")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    WAITED_S_FIELD_NUMBER: _ClassVar[int]
    VERIFIED_S_FIELD_NUMBER: _ClassVar[int]
    RUNNING_S_FIELD_NUMBER: _ClassVar[int]
    WAS_FIELD_NUMBER: _ClassVar[int]
    NOW_FIELD_NUMBER: _ClassVar[int]
    HOOK_PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    image: Image
    waited_s: float
    verified_s: float
    running_s: float
    was: Placement
    now: Placement
    hook_problems: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, image: _Optional[_Union[Image, _Mapping]] = ..., waited_s: _Optional[float] = ..., verified_s: _Optional[float] = ..., running_s: _Optional[float] = ..., was: _Optional[_Union[Placement, _Mapping]] = ..., now: _Optional[_Union[Placement, _Mapping]] = ..., hook_problems: _Optional[_Iterable[str]] = ...) -> None: ...

class Placement(_message.Message):
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

class PlanDumpRequest(_message.Message):
    __slots__ = ("namespace", "pod", "containers")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    POD_FIELD_NUMBER: _ClassVar[int]
    CONTAINERS_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    pod: str
    containers: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, namespace: _Optional[str] = ..., pod: _Optional[str] = ..., containers: _Optional[_Iterable[str]] = ...) -> None: ...

class PlanDumpResponse(_message.Message):
    __slots__ = ("plan", "connections")
    PLAN_FIELD_NUMBER: _ClassVar[int]
    CONNECTIONS_FIELD_NUMBER: _ClassVar[int]
    plan: _struct_pb2.Struct
    connections: _containers.RepeatedCompositeFieldContainer[Connection]
    def __init__(self, plan: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ..., connections: _Optional[_Iterable[_Union[Connection, _Mapping]]] = ...) -> None: ...

class Connection(_message.Message):
    __slots__ = ("local", "remote")
    LOCAL_FIELD_NUMBER: _ClassVar[int]
    REMOTE_FIELD_NUMBER: _ClassVar[int]
    local: str
    remote: str
    def __init__(self, local: _Optional[str] = ..., remote: _Optional[str] = ...) -> None: ...

class Image(_message.Message):
    __slots__ = ("name", "group", "epoch", "created_at", "members", "raw_bytes", "new_bytes", "stored_bytes", "pages", "zero_pages", "damage", "storage")
    NAME_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    RAW_BYTES_FIELD_NUMBER: _ClassVar[int]
    NEW_BYTES_FIELD_NUMBER: _ClassVar[int]
    STORED_BYTES_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    ZERO_PAGES_FIELD_NUMBER: _ClassVar[int]
    DAMAGE_FIELD_NUMBER: _ClassVar[int]
    STORAGE_FIELD_NUMBER: _ClassVar[int]
    name: str
    group: str
    epoch: str
    created_at: _timestamp_pb2.Timestamp
    members: _containers.RepeatedScalarFieldContainer[str]
    raw_bytes: int
    new_bytes: int
    stored_bytes: int
    pages: int
    zero_pages: int
    damage: str
    storage: str
    def __init__(self, name: _Optional[str] = ..., group: _Optional[str] = ..., epoch: _Optional[str] = ..., created_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., members: _Optional[_Iterable[str]] = ..., raw_bytes: _Optional[int] = ..., new_bytes: _Optional[int] = ..., stored_bytes: _Optional[int] = ..., pages: _Optional[int] = ..., zero_pages: _Optional[int] = ..., damage: _Optional[str] = ..., storage: _Optional[str] = ...) -> None: ...

class UnreadStorage(_message.Message):
    __slots__ = ("storage", "problem")
    STORAGE_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    storage: str
    problem: str
    def __init__(self, storage: _Optional[str] = ..., problem: _Optional[str] = ...) -> None: ...

class ListImagesRequest(_message.Message):
    __slots__ = ("namespace", "group", "page_size", "page_token", "storage")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    STORAGE_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    group: str
    page_size: int
    page_token: str
    storage: str
    def __init__(self, namespace: _Optional[str] = ..., group: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ..., storage: _Optional[str] = ...) -> None: ...

class ListImagesResponse(_message.Message):
    __slots__ = ("images", "next_page_token", "unread")
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    UNREAD_FIELD_NUMBER: _ClassVar[int]
    images: _containers.RepeatedCompositeFieldContainer[Image]
    next_page_token: str
    unread: _containers.RepeatedCompositeFieldContainer[UnreadStorage]
    def __init__(self, images: _Optional[_Iterable[_Union[Image, _Mapping]]] = ..., next_page_token: _Optional[str] = ..., unread: _Optional[_Iterable[_Union[UnreadStorage, _Mapping]]] = ...) -> None: ...

class GetImageRequest(_message.Message):
    __slots__ = ("namespace", "image", "storage")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    STORAGE_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    image: str
    storage: str
    def __init__(self, namespace: _Optional[str] = ..., image: _Optional[str] = ..., storage: _Optional[str] = ...) -> None: ...

class GetImageResponse(_message.Message):
    __slots__ = ("image", "detail", "pod_template_json", "pod_uid", "node", "restored_into", "obstacles", "pods", "jobset_json")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    POD_TEMPLATE_JSON_FIELD_NUMBER: _ClassVar[int]
    POD_UID_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    RESTORED_INTO_FIELD_NUMBER: _ClassVar[int]
    OBSTACLES_FIELD_NUMBER: _ClassVar[int]
    PODS_FIELD_NUMBER: _ClassVar[int]
    JOBSET_JSON_FIELD_NUMBER: _ClassVar[int]
    image: Image
    detail: _struct_pb2.Struct
    pod_template_json: str
    pod_uid: str
    node: str
    restored_into: str
    obstacles: _containers.RepeatedScalarFieldContainer[str]
    pods: _containers.RepeatedCompositeFieldContainer[PodOfImage]
    jobset_json: str
    def __init__(self, image: _Optional[_Union[Image, _Mapping]] = ..., detail: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ..., pod_template_json: _Optional[str] = ..., pod_uid: _Optional[str] = ..., node: _Optional[str] = ..., restored_into: _Optional[str] = ..., obstacles: _Optional[_Iterable[str]] = ..., pods: _Optional[_Iterable[_Union[PodOfImage, _Mapping]]] = ..., jobset_json: _Optional[str] = ...) -> None: ...

class PodOfImage(_message.Message):
    __slots__ = ("member", "was")
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    WAS_FIELD_NUMBER: _ClassVar[int]
    member: str
    was: Placement
    def __init__(self, member: _Optional[str] = ..., was: _Optional[_Union[Placement, _Mapping]] = ...) -> None: ...

class VerifyImageRequest(_message.Message):
    __slots__ = ("namespace", "image", "storage")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    STORAGE_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    image: str
    storage: str
    def __init__(self, namespace: _Optional[str] = ..., image: _Optional[str] = ..., storage: _Optional[str] = ...) -> None: ...

class VerifyEvent(_message.Message):
    __slots__ = ("done_bytes", "total_bytes", "outcome")
    DONE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    done_bytes: int
    total_bytes: int
    outcome: VerifyOutcome
    def __init__(self, done_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ..., outcome: _Optional[_Union[VerifyOutcome, _Mapping]] = ...) -> None: ...

class VerifyOutcome(_message.Message):
    __slots__ = ("good", "read_bytes", "damaged")
    GOOD_FIELD_NUMBER: _ClassVar[int]
    READ_BYTES_FIELD_NUMBER: _ClassVar[int]
    DAMAGED_FIELD_NUMBER: _ClassVar[int]
    good: bool
    read_bytes: int
    damaged: _containers.RepeatedCompositeFieldContainer[Damage]
    def __init__(self, good: _Optional[bool] = ..., read_bytes: _Optional[int] = ..., damaged: _Optional[_Iterable[_Union[Damage, _Mapping]]] = ...) -> None: ...

class Damage(_message.Message):
    __slots__ = ("part", "problem")
    PART_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    part: str
    problem: str
    def __init__(self, part: _Optional[str] = ..., problem: _Optional[str] = ...) -> None: ...

class DeleteImageRequest(_message.Message):
    __slots__ = ("namespace", "image", "storage")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    STORAGE_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    image: str
    storage: str
    def __init__(self, namespace: _Optional[str] = ..., image: _Optional[str] = ..., storage: _Optional[str] = ...) -> None: ...

class PruneImagesRequest(_message.Message):
    __slots__ = ("namespace", "group", "keep_last", "keep_within_s", "dry_run", "storage")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    KEEP_LAST_FIELD_NUMBER: _ClassVar[int]
    KEEP_WITHIN_S_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    STORAGE_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    group: str
    keep_last: int
    keep_within_s: float
    dry_run: bool
    storage: str
    def __init__(self, namespace: _Optional[str] = ..., group: _Optional[str] = ..., keep_last: _Optional[int] = ..., keep_within_s: _Optional[float] = ..., dry_run: _Optional[bool] = ..., storage: _Optional[str] = ...) -> None: ...

class PruneResponse(_message.Message):
    __slots__ = ("report",)
    REPORT_FIELD_NUMBER: _ClassVar[int]
    report: _struct_pb2.Struct
    def __init__(self, report: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ...) -> None: ...

class ExportImageRequest(_message.Message):
    __slots__ = ("namespace", "image", "member", "storage")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    STORAGE_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    image: str
    member: str
    storage: str
    def __init__(self, namespace: _Optional[str] = ..., image: _Optional[str] = ..., member: _Optional[str] = ..., storage: _Optional[str] = ...) -> None: ...

class ExportImageEvent(_message.Message):
    __slots__ = ("begun", "content", "outcome")
    BEGUN_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    begun: ExportBegun
    content: bytes
    outcome: ExportOutcome
    def __init__(self, begun: _Optional[_Union[ExportBegun, _Mapping]] = ..., content: _Optional[bytes] = ..., outcome: _Optional[_Union[ExportOutcome, _Mapping]] = ...) -> None: ...

class ExportBegun(_message.Message):
    __slots__ = ("image", "member", "machine", "expected_bytes", "restorable")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    MACHINE_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESTORABLE_FIELD_NUMBER: _ClassVar[int]
    image: str
    member: str
    machine: str
    expected_bytes: int
    restorable: bool
    def __init__(self, image: _Optional[str] = ..., member: _Optional[str] = ..., machine: _Optional[str] = ..., expected_bytes: _Optional[int] = ..., restorable: _Optional[bool] = ...) -> None: ...

class ExportOutcome(_message.Message):
    __slots__ = ("size_bytes", "left_out")
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    LEFT_OUT_FIELD_NUMBER: _ClassVar[int]
    size_bytes: int
    left_out: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, size_bytes: _Optional[int] = ..., left_out: _Optional[_Iterable[str]] = ...) -> None: ...

class ImportImageRequest(_message.Message):
    __slots__ = ("namespace", "group", "size_bytes", "storage", "content")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    STORAGE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    group: str
    size_bytes: int
    storage: str
    content: bytes
    def __init__(self, namespace: _Optional[str] = ..., group: _Optional[str] = ..., size_bytes: _Optional[int] = ..., storage: _Optional[str] = ..., content: _Optional[bytes] = ...) -> None: ...

class ImportImageResponse(_message.Message):
    __slots__ = ("image",)
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    image: Image
    def __init__(self, image: _Optional[_Union[Image, _Mapping]] = ...) -> None: ...

class ExamineRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ExamineResponse(_message.Message):
    __slots__ = ("node", "checks")
    NODE_FIELD_NUMBER: _ClassVar[int]
    CHECKS_FIELD_NUMBER: _ClassVar[int]
    node: str
    checks: _containers.RepeatedCompositeFieldContainer[Check]
    def __init__(self, node: _Optional[str] = ..., checks: _Optional[_Iterable[_Union[Check, _Mapping]]] = ...) -> None: ...

class Check(_message.Message):
    __slots__ = ("name", "status", "found", "consequence", "cure")
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    FOUND_FIELD_NUMBER: _ClassVar[int]
    CONSEQUENCE_FIELD_NUMBER: _ClassVar[int]
    CURE_FIELD_NUMBER: _ClassVar[int]
    name: str
    status: str
    found: str
    consequence: str
    cure: str
    def __init__(self, name: _Optional[str] = ..., status: _Optional[str] = ..., found: _Optional[str] = ..., consequence: _Optional[str] = ..., cure: _Optional[str] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("code", "message", "hint", "retryable", "exit_status", "facts")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    HINT_FIELD_NUMBER: _ClassVar[int]
    RETRYABLE_FIELD_NUMBER: _ClassVar[int]
    EXIT_STATUS_FIELD_NUMBER: _ClassVar[int]
    FACTS_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    hint: str
    retryable: bool
    exit_status: int
    facts: _struct_pb2.Struct
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., hint: _Optional[str] = ..., retryable: _Optional[bool] = ..., exit_status: _Optional[int] = ..., facts: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ...) -> None: ...
