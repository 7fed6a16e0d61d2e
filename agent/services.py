"""The programs that serve a cluster, put together: admission webhook, node agent, coordinator.

Promises: as in wiring, nothing here decides anything; each returns once ``stop`` is set.
Does not: print, parse or exit.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from agent import errors, podengines, wiring
from agent.host import memory
from agent.model import storage
from agent.settings import Settings

if TYPE_CHECKING:
    from agent.node.service import Documents

# Emptied at boot, like the processes that it tells of.
_TRAIL = "/run/ckpt-agent/pods"
_HOOKS_TRAIL = "/run/ckpt-agent/hooks"
# The name in the agents' certificates, whatever their addresses.
_SERVER_NAME = "ckpt-agent-node.ckpt-agent.svc"
_HEALTH_S = 5.0
# Most of them stand for callers who watch an operation.
_COORDINATOR_THREADS = 128
# Its ServiceAccount in deploy/, as the API server names it.
COORDINATOR = "system:serviceaccount:{}:ckpt-agent-coordinator"


def admit(settings: Settings, *, port: int, stop: threading.Event) -> None:
    """Serve a cluster's admission webhook and keep its certificates until ``stop`` is set.

    Raises:
        errors.Refused | errors.EnvironmentUnfit: the settings or the cluster do not let it begin.
    """
    # Only here: the client of the API server takes longer to import than most verbs take to run.
    from agent.admission import rotation, serve
    from agent.kube import connection

    policy = rotation.Policy(
        leaf_lifetime_s=settings.leaf_lifetime_s,
        leaf_renew_before_s=settings.leaf_renew_before_s,
        authority_lifetime_s=settings.ca_lifetime_s,
        authority_renew_before_s=settings.ca_renew_before_s,
        overlap_s=settings.trust_overlap_s,
    )
    cluster = connection.connect()
    pod = os.uname().nodename
    options = serve.Options(
        namespace=cluster.namespace,
        image=settings.image or serve.own_image(cluster, cluster.namespace, pod),
        holder=pod,
        port=port,
        policy=policy,
    )
    serve.Admission(cluster, options).run(stop)


def node(settings: Settings, documents: Documents, stop: threading.Event) -> None:
    """Serve this node of a cluster until ``stop`` is set; ``documents`` are how results look.

    Raises:
        errors.Refused | errors.EnvironmentUnfit: the settings or the node do not let it begin.
    """
    wiring.prepare_grpc(silent=False)
    from agent.cri.runtime import Runtime
    from agent.host.probes import Probes
    from agent.kube import access, connection, events, namespaces
    from agent.kube.pods import PodWatch
    from agent.model.rates import Rate
    from agent.node import (
        abandoned,
        epochs,
        hookcalls,
        interrupted,
        podhooks,
        podwork,
        readiness,
        serve,
        service,
        storages,
        stores,
    )
    from agent.node import doctor as node_doctor
    from agent.node import transfers as node_transfers
    from agent.node.operations import Operations
    from agent.node.pods import Pods
    from agent.rpc import certificates, limits, server

    memory.keep_small()
    name = settings.node_name
    if not name:
        raise errors.InvalidInput(
            "which node this is was not said", hint="set node_name (CKPT_AGENT_NODE_NAME)"
        )
    places = storage.configured(settings.store.path, settings.stores)
    with contextlib.ExitStack() as stack:
        api = stack.enter_context(
            contextlib.closing(connection.connect(settings.kubeconfig, settings.context))
        )
        runtime = stack.enter_context(contextlib.closing(Runtime(settings.runtime_socket)))
        watch = PodWatch(api, name)
        by_name = {
            name: stores.NamespaceStores(path, wiring.directory) for name, path in places.items()
        }
        known = storages.Storages(by_name, lambda name: namespaces.read_annotations(api, name))
        pods = Pods(watch, runtime, podengines.hold_state, name)
        operations = Operations(settings.parallel)
        trail = interrupted.Trail(_TRAIL)
        hooks_trail = interrupted.Trail(_HOOKS_TRAIL)
        teller = events.Happenings(api, name)
        pod_hooks = podhooks.PodHooks(hookcalls.Calls(runtime), teller, hooks_trail)
        engines = stack.enter_context(podengines.PodEngines(settings).prepared())
        guard = access.Access(api)
        authorities = certificates.Authorities(guard.client_authorities)
        parts = service.Parts(
            settings=settings,
            node=name,
            authorize=guard.authorize,
            pods=pods,
            work=podwork.PodWork(pods, engines, known, operations, trail, teller, pod_hooks),
            operations=operations,
            storages=known,
            transfers=node_transfers.Transfers(wiring.formats(), settings, operations),
            plan=engines.plan,
            examine=lambda: (
                *node_doctor.examine_cluster(runtime.ready, watch),
                abandoned.examine(by_name, lambda name: namespaces.exists(api, name)),
                *node_doctor.examine(
                    criu=lambda: wiring.criu(settings),
                    places=[
                        node_doctor.Place(
                            each.root, each.space, None, "" if name == storage.DEFAULT else name
                        )
                        for name, each in by_name.items()
                    ],
                    work_dir=settings.work_dir,
                    leftovers=lambda: wiring.leftovers(settings),
                ),
            ),
            documents=documents,
        )
        served = server.Server(
            {"Node": service.NodeService(parts), "Epochs": epochs.EpochService(parts)},
            guard,
            name,
            certificates.Certificates(settings.tls_dir, authorities.pem),
            server.Ports(token=settings.token_port, certificate=settings.certificate_port),
            each_caller=limits.for_agents(
                Rate(settings.caller_rate_per_s, settings.caller_burst),
                settings.caller_streams,
                COORDINATOR.format(settings.agent_namespace),
            ),
        )
        checks: dict[str, Callable[[], object]] = {
            "CRIU": functools.cache(lambda: wiring.criu(settings)),
            "the store's volume": known.check,
            "the container runtime": runtime.ready,
            "the API server": watch.check_synced,
            "client authorities": authorities.refresh,
        }
        looked = readiness.Readiness(checks, lambda ready: served.set_serving(serving=ready))
        serve.run(
            serve.Parts(
                node=name,
                server=served,
                probes=Probes(settings.probe_port, lambda: not looked.reason),
                watch=watch,
                readiness=looked,
                operations=operations,
                trail=trail,
                teller=teller,
                recover=engines.recover,
                follow_up=parts.work.run_owed_hooks,
                grace_s=settings.shutdown_grace_s,
            ),
            stop,
        )


def coordinator(settings: Settings, stop: threading.Event) -> None:
    """Be one replica of a cluster's coordinator until ``stop`` is set.

    Raises:
        errors.Refused | errors.EnvironmentUnfit: the settings or the cluster do not let it begin,
            or another replica leads in its place.
    """
    wiring.prepare_grpc(silent=False)
    import secrets

    from agent.coordination import leading, records, reviews
    from agent.coordination.book import Book
    from agent.coordination.resuming import Resuming
    from agent.coordination.runner import Runner
    from agent.coordination.service import CoordinatorService, Lead
    from agent.coordination.work import Work
    from agent.host.probes import Probes
    from agent.kube import access, connection
    from agent.kube.leases import Lease
    from agent.model.operations import Operation
    from agent.model.rates import Rate
    from agent.rpc import certificates, limits, server

    memory.keep_small()
    with contextlib.ExitStack() as stack:
        api = stack.enter_context(
            contextlib.closing(connection.connect(settings.kubeconfig, settings.context))
        )
        # A container that is started anew has the name of the one before.
        holder = f"{os.uname().nodename}_{secrets.token_hex(4)}"
        guard = access.Access(api)
        authorities = certificates.Authorities(guard.client_authorities)
        replica = leading.Replica()

        leads = api.guarded(replica.check)

        def take_lead() -> tuple[Lead, list[Operation]]:
            book = Book(records.Records(leads, settings.agent_namespace, holder))
            work = Work(leads, settings, book, reviews.Reviews(guard.authorize))
            runner = Runner(book, work.run, Resuming(book, work).run, settings.coordinator_parallel)
            return Lead(book, runner, work), book.load()

        served = server.Server(
            {
                "Coordinator": CoordinatorService(
                    lambda: replica.lead, settings.operation_deadline_s
                )
            },
            guard,
            "",
            certificates.Certificates(settings.tls_dir, authorities.pem),
            server.Ports(
                token=settings.coordinator_token_port,
                certificate=settings.coordinator_certificate_port,
            ),
            threads=_COORDINATOR_THREADS,
            each_caller=limits.for_coordinators(
                Rate(settings.caller_rate_per_s, settings.caller_burst),
                settings.caller_streams,
                _COORDINATOR_THREADS,
            ),
        )
        parts = leading.Parts(
            server=served,
            probes=Probes(settings.probe_port, lambda: replica.healthy),
            lease=Lease(
                api,
                settings.agent_namespace,
                leading.LEASE_NAME,
                holder=holder,
                duration_s=leading.LEASE_S,
            ),
            take_lead=take_lead,
            refresh=authorities.refresh,
            grace_s=settings.shutdown_grace_s,
        )
        replica.run(parts, stop)


def node_health(settings: Settings) -> None:
    """Return if the agent that runs here serves.

    Raises:
        errors.Unreachable: it does not.
        errors.EnvironmentUnfit: its certificate's authority is not here.
    """
    wiring.prepare_grpc()
    from agent.rpc import certificates, health

    target = f"localhost:{settings.token_port}"
    authority = certificates.authority(settings.tls_dir)
    health.check(target, authority, _SERVER_NAME, _HEALTH_S)
