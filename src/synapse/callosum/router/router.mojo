"""The core of a router: queues of Python objects by slot, all indices in native memory. router_reference.py specifies it.

Its functions have the form of CPython's built-in functions of one or no argument, and are called as such: with the
interpreter lock held, and `self` an integer that is the address of a State. They use only functions of the stable C
API, which the process that loads them provides.
"""

from std.bit import count_leading_zeros
from std.ffi import external_call
from std.sys import CompilationTarget

comptime ABI_VERSION = 1
comptime NEEDS_AVX2 = Int(CompilationTarget.has_avx2())
comptime NEEDS_AVX512 = Int(CompilationTarget.has_avx512f())
comptime CPU_FEATURES = NEEDS_AVX2 | NEEDS_AVX512 << 3
comptime PRIORITIES = 10
comptime LANES = 2 * PRIORITIES
comptime INTERNAL = (1 << PRIORITIES) - 1

comptime Object = Int
"""The address of a Python object; 0 where the interpreter has an exception to raise."""
comptime Numbers = Pointer[Int64, MutUntrackedOrigin]

comptime QUEUED = 0
comptime REFUSED = 1
comptime FAILED = 2


struct State:
    """Field by field the `STATE` of router_native.py."""

    var capacity: Int
    var room: Int
    var share: Int
    var streak: Int  # external messages given since the last internal one, while one waited
    var mask: Int  # a bit for each lane that has messages
    var chores: Int
    var waiting: Int
    var heads: Numbers  # [20]: the slot of each lane's first message, 0 to capacity - 1
    var counts: Numbers  # [20]
    var slots: Numbers  # [20, capacity]: messages, each with a reference of its own
    var lane_name: Object  # the string "lane"
    var none: Object
    var refused: Object  # the hooks
    var nothing: Object
    var arrived: Object
    var given: Object


comptime StatePointer = Pointer[State, MutUntrackedOrigin]


@always_inline
def state_of(address: Object) -> StatePointer:
    return external_call["PyLong_AsVoidPtr", StatePointer](address)


@always_inline
def keep(thing: Object):
    external_call["Py_IncRef", NoneType](thing)


@always_inline
def let_go(thing: Object):
    external_call["Py_DecRef", NoneType](thing)


@always_inline
def highest(lanes: Int) -> Int:
    return 63 - Int(count_leading_zeros(Int64(lanes)))


@always_inline
def put_one(state: StatePointer, message: Object) -> Int:
    """Queues a message. Reading its lane may run Python code: nothing of the state is held meanwhile."""
    var number = external_call["PyObject_GetAttr", Object](message, state[].lane_name)
    if number == 0:
        return FAILED
    var lane = external_call["PyLong_AsLong", Int](number)
    let_go(number)
    if lane < 0 or lane >= 2 * LANES:
        return FAILED if external_call["PyErr_Occurred", Object]() != 0 else REFUSED
    var timed = lane >= LANES
    if timed:
        lane -= LANES
    var count = Int(state[].counts.unsafe_offset(lane)[])
    if count >= state[].room:
        return REFUSED
    var slot = Int(state[].heads.unsafe_offset(lane)[]) + count
    if slot >= state[].capacity:
        slot -= state[].capacity
    keep(message)
    state[].slots.unsafe_offset(lane * state[].capacity + slot)[] = Int64(message)
    state[].counts.unsafe_offset(lane)[] = Int64(count + 1)
    state[].mask |= 1 << lane
    if timed:
        state[].chores += 1
    return QUEUED


@always_inline
def take_one(state: StatePointer) -> Object:
    """The next message, with its reference. There is one."""
    var lanes = state[].mask
    if lanes > INTERNAL and lanes & INTERNAL != 0:
        if state[].streak < state[].share:
            state[].streak += 1
        else:
            state[].streak = 0
            lanes &= INTERNAL
    else:
        state[].streak = 0
    var lane = highest(lanes)
    var slot = Int(state[].heads.unsafe_offset(lane)[])
    var message = Int(state[].slots.unsafe_offset(lane * state[].capacity + slot)[])
    slot += 1
    state[].heads.unsafe_offset(lane)[] = Int64(slot if slot < state[].capacity else 0)
    var count = Int(state[].counts.unsafe_offset(lane)[]) - 1
    state[].counts.unsafe_offset(lane)[] = Int64(count)
    if count == 0:
        state[].mask &= ~(1 << lane)
    return message


@export("router_abi_version")
def router_abi_version() abi("C") -> Int:
    return ABI_VERSION


@export("router_cpu_features")
def router_cpu_features() abi("C") -> Int:
    return CPU_FEATURES


@export("router_put")
def router_put(address: Object, message: Object) abi("C") -> Object:
    """Core.put(message)."""
    var state = state_of(address)
    var outcome = put_one(state, message)
    if outcome == FAILED:
        return 0
    if outcome == REFUSED:
        return external_call["PyObject_CallOneArg", Object](state[].refused, message)
    if state[].waiting != 0:
        state[].waiting = 0
        return external_call["PyObject_CallNoArgs", Object](state[].arrived)
    keep(state[].none)
    return state[].none


@export("router_take")
def router_take(address: Object, nothing: Object) abi("C") -> Object:
    """Core.take()."""
    var state = state_of(address)
    if state[].mask == 0:
        return external_call["PyObject_CallNoArgs", Object](state[].nothing)
    var message = take_one(state)
    if state[].chores == 0:
        return message
    var given = external_call["PyObject_CallOneArg", Object](state[].given, message)
    let_go(message)
    return given


@export("router_put_many")
def router_put_many(address: Object, messages: Object) abi("C") -> Object:
    """Core.put_many(list)."""
    var state = state_of(address)
    var size = external_call["PyList_Size", Int](messages)
    if size < 0:
        return 0
    for index in range(size):
        var message = external_call["PyList_GetItem", Object](messages, index)
        if message == 0:
            return 0
        keep(message)
        var outcome = put_one(state, message)
        let_go(message)
        if outcome == FAILED:
            return 0
        if outcome == REFUSED:
            return external_call["PyLong_FromLong", Object](index)
    return external_call["PyLong_FromLong", Object](size)


@export("router_take_many")
def router_take_many(address: Object, limit: Object) abi("C") -> Object:
    """Core.take_many(integer)."""
    var state = state_of(address)
    var wanted = external_call["PyLong_AsLong", Int](limit)
    if wanted < 0:
        if external_call["PyErr_Occurred", Object]() != 0:
            return 0
        wanted = 0
    var waiting = 0
    for lane in range(LANES):
        waiting += Int(state[].counts.unsafe_offset(lane)[])
    var size = min(wanted, waiting)
    var messages = external_call["PyList_New", Object](size)
    if messages == 0:
        return 0
    for index in range(size):
        if state[].mask == 0:  # making the list collected garbage, and a finalizer has taken messages
            if external_call["PyList_SetSlice", Int32](messages, index, size, Object(0)) != 0:
                let_go(messages)
                return 0
            return messages
        if external_call["PyList_SetItem", Int32](messages, index, take_one(state)) != 0:
            let_go(messages)
            return 0
    return messages


@export("router_heads")
def router_heads(address: Object, nothing: Object) abi("C") -> Object:
    """Core.heads()."""
    var state = state_of(address)
    var messages = external_call["PyList_New", Object](0)
    if messages == 0:
        return 0
    for lane in range(LANES):
        if state[].counts.unsafe_offset(lane)[] != 0:
            var slot = Int(state[].heads.unsafe_offset(lane)[])
            var message = Int(state[].slots.unsafe_offset(lane * state[].capacity + slot)[])
            if external_call["PyList_Append", Int32](messages, message) != 0:
                let_go(messages)
                return 0
    return messages


@export("router_clear")
def router_clear(address: Object, nothing: Object) abi("C") -> Object:
    """Lets go of everything that is queued, at the end of a core."""
    var state = state_of(address)
    while state[].mask != 0:
        let_go(take_one(state))
    keep(state[].none)
    return state[].none
