"""Every world that coordinators, members and a store can come to by the protocol's shipped code.

A world holds the machines, what was ever sent (a message may arrive late, twice or never, so none
is ever taken away), effects under way, and the store's one decision. ``steps`` yields what can
happen next; messages, timers and effects come in any order, as often as they like.

Promises: the machines are the ones that ship; whatever a real network, clock or store may do is
among the steps. Members are alike, so worlds that differ in their order only are one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from agent.coordinator import machine
from agent.coordinator.machine import Coordination, State
from agent.model.protocol import COURSES, RESTORE, Answer, Course, Decision, Step, Told
from agent.node import participant
from agent.node.participant import Participant, Phase, Processes, Timer

_PROBLEM = "x"


@dataclasses.dataclass(frozen=True, slots=True)
class Member:
    """One member: its machine's fields, what was sent to and by it, what is under way, and what an
    onlooker knows: whether it ``held`` before it was read, was ``captured``, or went on. One that
    is restored was ``captured`` when it stood complete, and ``stands`` until that is undone.
    """

    machine: tuple[Any, ...]
    inbox: frozenset[Told] = frozenset()
    outbox: frozenset[Answer] = frozenset()
    letting_go: participant.LetGo | None = None
    settling: bool = False
    held: bool = False
    captured: bool = False
    stands: bool = False
    went_on: bool = False
    dropped: bool = False
    crashed: bool = False

    def participant(self) -> Participant:
        return Participant(*self.machine)


@dataclasses.dataclass(frozen=True, slots=True)
class Coordinator:
    """One coordinator: its machine's fields (those about members are kept with the world, by
    member), the store's operations under way.
    """

    state: State
    token: int
    answered: tuple[bool, ...]
    asking: frozenset[Decision] = frozenset()


@dataclasses.dataclass(frozen=True, slots=True)
class World:
    """All there is. ``torn``: a member was read while another one did not stand still and
    silent. ``coordinators`` are the first and whoever took over; None is dead.
    """

    course: Course
    members: tuple[Member, ...]
    coordinators: tuple[Coordinator | None, ...]
    decision: Decision | None = None
    torn: bool = False
    crashes: int = 0

    def key(self) -> tuple[Any, ...]:
        """Equal for worlds that differ in the members' order only."""
        rows = sorted(
            (_number(member), *(each and each.answered[i] for each in self.coordinators))
            for i, member in enumerate(self.members)
        )
        who = tuple(
            None if each is None else (each.state.name, each.token, *sorted(_named(each.asking)))
            for each in self.coordinators
        )
        return (*rows, who, self.decision and self.decision.name, self.torn, self.crashes)


_NUMBERS: dict[Member, int] = {}


def _number(member: Member) -> int:
    """A number for a member in this condition, so that worlds are compared quickly."""
    return _NUMBERS.setdefault(member, len(_NUMBERS))


def _named(decisions: frozenset[Decision]) -> list[str]:
    return [each.name for each in decisions]


def _fields(machine: Participant) -> tuple[Any, ...]:
    return (
        machine.course,
        machine.token,
        machine.phase,
        machine.done,
        machine.busy,
        machine.processes,
        _PROBLEM if machine.problem else "",
        machine.outcome,
    )


def begin(course: Course, members: int) -> World:
    """A coordinator has just begun an epoch."""
    member = Member(_fields(Participant.begin(course)))
    made = Coordination(course, members, token=1)
    commands = made.begin()
    world = World(course, (member,) * members, (Coordinator(made.state, 1, (False,) * members),))
    return _obey(world, 0, made, commands)


def _coordination(world: World, which: int) -> Coordination:
    each = world.coordinators[which]
    assert each is not None
    answered = {i for i, there in enumerate(each.answered) if there}
    return Coordination(world.course, len(world.members), each.token, each.state, answered)


def _obey(world: World, which: int, made: Coordination, commands: list[machine.Command]) -> World:
    members = list(world.members)
    before = world.coordinators[which]
    asking = before.asking if before else frozenset()
    for command in commands:
        if isinstance(command, machine.Tell):
            for i in command.members:
                inbox = members[i].inbox | {command.told}
                members[i] = dataclasses.replace(members[i], inbox=inbox)
        elif isinstance(command, machine.Decide):
            asking |= {command.wish}
    answered = tuple(i in made.answered for i in range(made.members))
    coordinators = list(world.coordinators)
    coordinators[which] = Coordinator(made.state, made.token, answered, asking)
    return _forgotten(
        dataclasses.replace(world, members=tuple(members), coordinators=tuple(coordinators))
    )


def _forgotten(world: World) -> World:
    """Without the answers that no coordinator will take up any more: they change nothing."""
    heard = _heard(world.course, world.coordinators)
    members = tuple(
        member
        if all(each.step in heard for each in member.outbox)
        else dataclasses.replace(member, outbox=_of(member.outbox, heard))
        for member in world.members
    )
    return dataclasses.replace(world, members=members)


def _heard(course: Course, coordinators: Iterable[Coordinator | None]) -> frozenset[Step]:
    """The steps whose answers some coordinator may still take up."""
    found: set[Step] = set()
    for each in coordinators:
        if each is not None and each.state not in machine.FINAL:
            found |= _HEARD[course.name][each.state]
    return frozenset(found)


def _of(answers: frozenset[Answer], heard: frozenset[Step]) -> frozenset[Answer]:
    return frozenset(each for each in answers if each.step in heard)


def _reachable(course: Course) -> dict[State, set[Step]]:
    table = machine.TRANSITIONS[course.name]
    reach = {state: {state} for state in State}
    for _ in State:
        for (here, _given), there in table.items():
            reach[here] |= reach[there]
    return {
        state: {machine.ASKS[each] for each in reached if each in machine.ASKS}
        for state, reached in reach.items()
    }


_HELD = {course.name for course in COURSES.values() if Step.HOLD in course}
_HEARD = {course.name: _reachable(course) for course in COURSES.values()}


def _carry_out(
    world: World, which: int, made: Participant, effects: list[participant.Effect], **known: Any
) -> World:
    member = dataclasses.replace(world.members[which], machine=_fields(made), **known)
    torn = world.torn
    for effect in effects:
        if isinstance(effect, participant.Reply):
            problem = _PROBLEM if effect.answer.problem else ""
            said = frozenset({Answer(effect.answer.step, problem)})
            heard = _heard(world.course, world.coordinators)
            outbox = member.outbox | _of(said, heard)
            member = dataclasses.replace(member, outbox=outbox)
        elif isinstance(effect, participant.LetGo):
            member = dataclasses.replace(member, letting_go=effect)
        elif isinstance(effect, participant.Settle):
            member = dataclasses.replace(member, settling=True)
        elif isinstance(effect, participant.Close):
            dropped = effect.decision is Decision.ABANDONED
            member = dataclasses.replace(member, settling=False, dropped=dropped)
            if not dropped:
                assert world.decision is Decision.COMMITTED, "kept what is not committed"
        elif isinstance(effect, participant.Do) and effect.step is Step.CAPTURE:
            torn |= not _all_silent(world, but=which)
        elif isinstance(effect, participant.Do) and effect.step in world.course.after:
            assert world.decision is Decision.COMMITTED, "does what follows a commit without one"
    members = list(world.members)
    members[which] = member
    return dataclasses.replace(world, members=tuple(members), torn=torn)


def _all_silent(world: World, but: int) -> bool:
    """Whether every other member was read in this cut or stands still and silent to be read. Where
    holding is no step of its own, that all stand still and none has gone on since.
    """
    others = [each for i, each in enumerate(world.members) if i != but]
    if world.course.name in _HELD:
        return all(each.captured or (each.held and not each.went_on) for each in others)
    if Step.FREEZE not in world.course:
        return False
    frozen = world.course.position(Step.FREEZE)
    return all(each.participant().done > frozen and not each.went_on for each in others)


def steps(world: World, *, crashes: int, coordinators: int) -> Iterator[tuple[bool, World]]:
    """What can happen next; whether it is no fault, and the world after it."""
    for which, member in enumerate(world.members):
        yield from _member_steps(world, which, member)
        if world.crashes < crashes and not member.crashed:
            yield False, _crash(world, which)
    for which, each in enumerate(world.coordinators):
        if each is not None and each.state not in machine.FINAL:
            yield from _coordinator_steps(world, which, each)
            dead = (*world.coordinators[:which], None, *world.coordinators[which + 1 :])
            yield False, _forgotten(dataclasses.replace(world, coordinators=dead))
    if len(world.coordinators) < coordinators:
        yield False, _take_over(world)


def _take_over(world: World) -> World:
    token = len(world.coordinators) + 1
    made = Coordination(world.course, len(world.members), token)
    commands = made.take_over()
    more = dataclasses.replace(world, coordinators=(*world.coordinators, None))
    return _obey(more, len(world.coordinators), made, commands)


def _crash(world: World, which: int) -> World:
    """The member's agent dies: its processes go on, but not what was only restored; a new agent
    knows nothing of the epoch.
    """
    before = world.members[which]
    fresh = Participant(world.course, phase=Phase.CLOSED, problem=_PROBLEM)
    if world.course.name == RESTORE.name:
        fresh.processes = before.participant().processes
    member = dataclasses.replace(
        before,
        machine=_fields(fresh),
        letting_go=None,
        stands=fresh.processes is Processes.RUNNING and before.stands,
        settling=False,
        went_on=True,
        crashed=True,
    )
    members = (*world.members[:which], member, *world.members[which + 1 :])
    return dataclasses.replace(world, members=members, crashes=world.crashes + 1)


def _member_steps(world: World, which: int, member: Member) -> Iterator[tuple[bool, World]]:
    for told in member.inbox:
        made = member.participant()
        yield True, _carry_out(world, which, made, made.told(told))
    now = member.participant()
    if now.phase is not Phase.CLOSED:
        for timer in Timer:
            if timer is Timer.SILENCE or now.stopped:
                made = member.participant()
                yield True, _carry_out(world, which, made, made.expired(timer))
    if member.letting_go:
        yield from _let_go_steps(world, which, member, member.letting_go)
    elif now.busy is not None:
        yield from _effect_steps(world, which, member, now.busy)
    if member.settling:
        decision = world.decision or Decision.ABANDONED
        settled = dataclasses.replace(world, decision=decision)
        made = member.participant()
        yield True, _carry_out(settled, which, made, made.settled(decision), settling=False)


def _let_go_steps(
    world: World, which: int, member: Member, how: participant.LetGo
) -> Iterator[tuple[bool, World]]:
    made = member.participant()
    if world.course.name != RESTORE.name:
        yield True, _carry_out(world, which, made, made.let_go(), letting_go=None, went_on=True)
        return
    if how.committed and member.stands:
        yield True, _carry_out(world, which, made, made.let_go(), letting_go=None)
        made = member.participant()
    # Undone, or found to be gone.
    effects = made.let_go(running=False)
    sound = not (how.committed and member.stands)
    yield sound, _carry_out(world, which, made, effects, letting_go=None, stands=False)


def _effect_steps(
    world: World, which: int, member: Member, busy: Step
) -> Iterator[tuple[bool, World]]:
    made = member.participant()
    restores = world.course.name == RESTORE.name
    made = member.participant()
    # A tree may be gone when it is to run; before that, the store could not be asked.
    stands = member.stands and busy is not Step.RUN
    effects = made.could_not(busy, _PROBLEM)
    yield False, _carry_out(world, which, made, effects, stands=stands)
    made = member.participant()
    known = {}
    if busy is Step.HOLD:
        known = {"held": True}
    elif busy is Step.CAPTURE:
        known = {"captured": True}
        torn = world.torn or not _all_silent(world, but=which)
        world = dataclasses.replace(world, torn=torn)
    elif restores and busy in RESTORE.after:
        if not member.stands:
            return
    elif busy in (Step.RELEASE, Step.RESUME):
        known = {"went_on": True}
    elif busy is Step.STAND:
        known = {"captured": True, "stands": True}
    yield True, _carry_out(world, which, made, made.did(busy), **known)


def _coordinator_steps(world: World, which: int, each: Coordinator) -> Iterator[tuple[bool, World]]:
    for i, member in enumerate(world.members):
        for answer in member.outbox:
            if answer.step is machine.ASKS.get(each.state) and not each.answered[i]:
                made = _coordination(world, which)
                yield True, _obey(world, which, made, made.answer(i, answer))
    made = _coordination(world, which)
    yield True, _obey(world, which, made, made.expired(each.state))
    made = _coordination(world, which)
    yield False, _obey(world, which, made, made.cancel(_PROBLEM))
    for wish in each.asking:
        kept = dataclasses.replace(each, asking=each.asking - {wish})
        coordinators = (*world.coordinators[:which], kept, *world.coordinators[which + 1 :])
        asked = dataclasses.replace(world, coordinators=coordinators)
        made = _coordination(asked, which)
        yield False, _obey(asked, which, made, made.undecided(_PROBLEM))
        decided = dataclasses.replace(asked, decision=world.decision or wish)
        made = _coordination(decided, which)
        assert decided.decision is not None
        yield True, _obey(decided, which, made, made.decided(decided.decision))
        # The name was taken and the store's answer was lost.
        made = _coordination(decided, which)
        yield False, _obey(decided, which, made, made.undecided(_PROBLEM))


def check(world: World) -> None:
    """What holds in every world."""
    states = [each.state for each in world.coordinators if each is not None]
    committed = world.decision is Decision.COMMITTED
    for member in world.members:
        made = member.participant()
        if made.processes is Processes.RUNNING and world.course.name == RESTORE.name:
            assert committed, "runs without a commit"
            assert member.stands, "runs, and does not stand"
        if committed:
            assert member.captured, "committed without a member"
            assert not member.dropped, "committed, and a member's part is gone"
        if made.processes is Processes.ENDED:
            assert committed, "ended without a commit"
        if made.stopped:
            _check_released(made)
    if committed:
        assert not world.torn, "committed a cut that is torn"
        assert State.ABORTED not in states, "committed, and somebody was told that it failed"
        assert State.ABORTING not in states, "committed, and members are told to abort"
    else:
        after = {machine._STATE_OF[step] for step in world.course.after} | {State.COMMITTED}
        assert after.isdisjoint(states), "told as committed, and is not"


def _check_released(made: Participant) -> None:
    """Without a word from anybody, and with a store that never answers, the job goes on."""
    if made.phase is Phase.LETTING_GO or made.busy is Step.END:
        return
    for _ in range(2):
        effects = made.expired(Timer.STOPPED)
        if any(isinstance(each, participant.LetGo) for each in effects):
            return
    raise AssertionError("a member stands still for ever")


def settled(world: World) -> bool:
    """Whether nothing is left to do: nobody stands still, every epoch that began is over."""
    for member in world.members:
        made = member.participant()
        idle = made.phase is Phase.TAKING_PART and made.done == 0 and made.busy is None
        if made.stopped or not (made.phase is Phase.CLOSED or idle):
            return False
        if member.stands and made.processes is Processes.ABSENT:
            return False
    return all(each is None or each.state in machine.FINAL for each in world.coordinators)
