"""A CuPy made of NumPy: a class of arrays of its own, memory pools, streams, events, CUDA graphs.

Every operation is a launch on the current stream. It runs at once, but the rules of a device are
kept, and breaking one is an error:

- NumPy's arrays are refused, and a value that goes to the host is counted (`host_reads`).
- What a stream reads or writes, another one may only touch behind an event (or after the host has
  waited): memory that goes back to a pool and is handed out again included.
- While a stream captures, nothing may be read or copied from the host; what the launches write is
  undone at the end. What is recorded are addresses: a graph does not keep memory alive.
- Of two captured launches that touch the same bytes, one of them writing, one must come after the
  other by order of a stream or by an event; all streams must have come back at the end.
- At the end of a capture the memory of its pool holds NaN (-1 in integers), and nothing may be
  taken from that pool any more. A graph that touches memory that was given back is refused.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
import types
import weakref
from collections import defaultdict

import numpy as np


class CudaError(RuntimeError):
    """What CUDA would refuse, or let pass and go wrong."""


class OutOfMemoryError(MemoryError):
    """As CuPy's own is called."""


class Storage:
    """Bytes of a device, and who touched which of them last: (low, high, (stream, tick))."""

    def __init__(self, size, pool, stream):
        self.bytes = bytearray(b"\xff" * size)
        self.pool = pool
        self.stream = stream
        self.written, self.read = [], []
        self.handle = lambda: None  # of the array that they are now given to


class Handle(np.ndarray):
    """What an array keeps of its memory: when nobody has it any more, the memory goes back."""


class MemoryPool:
    """Memory by size and stream; what was given back last is handed out first."""

    def __init__(self):
        self._free = defaultdict(list)
        self._bytes = 0
        self.sealed = False

    def malloc(self, size):
        if self.sealed:
            raise CudaError("memory is taken from the pool of a captured graph")
        size = max(512, -(-size // 512) * 512)
        free = self._free[device.stream.ptr, size]
        if free:
            storage = free.pop()
            storage.bytes[:] = b"\xff" * size
        else:
            storage = Storage(size, weakref.ref(self), device.stream.ptr)
            self._bytes += size
        handle = np.ndarray.__new__(Handle, (size,), np.uint8, buffer=storage.bytes)
        handle.storage = storage
        storage.handle = weakref.ref(handle)
        device.given_out[handle.__array_interface__["data"][0]] = storage
        weakref.finalize(handle, _give_back, storage).atexit = False
        return handle

    def free_all_blocks(self):
        self._bytes -= sum(size * len(free) for (_, size), free in self._free.items())
        self._free.clear()

    def total_bytes(self):
        return self._bytes


def _give_back(storage):
    pool = storage.pool()
    if pool is not None:
        pool._free[storage.stream, len(storage.bytes)].append(storage)


class Event:
    def __init__(self, block=False, disable_timing=False, interprocess=False):
        self.clock = {}
        self.capture = None

    @property
    def done(self):
        return all(device.host_clock.get(s, 0) >= tick for s, tick in self.clock.items())

    def __del__(self):
        if self.capture is not None:
            self.capture.misses("an event")


_clocks = threading.RLock()


def _by_one_thread(method):
    """Let one thread at a time look at the clocks: two would count one launch of theirs."""

    @functools.wraps(method)
    def locked(*args, **kwargs):
        with _clocks:
            return method(*args, **kwargs)

    return locked


class Stream:
    """A queue of launches; `clock` says up to which of each stream's the next one comes after."""

    _count = 0

    def __init__(self, null=False, non_blocking=False, ptds=False):
        self.ptr = Stream._count
        Stream._count += 1
        self.clock = {}
        self.capture = None

    def __enter__(self):
        device.streams.append(self)
        return self

    def __exit__(self, *_):
        assert device.streams.pop() is self

    @_by_one_thread
    def record(self, event=None):
        event = Event() if event is None else event
        event.clock, event.capture = dict(self.clock), self.capture
        return event

    @_by_one_thread
    def wait_event(self, event):
        if event.capture is not None:
            if self.capture is None:
                event.capture.join(self)
        elif self.capture is not None and event.clock:
            self.capture.refuse("a captured stream waits for an event from outside")
        _merge(self.clock, event.clock)

    def _tick(self):
        self.clock[self.ptr] = self.clock.get(self.ptr, 0) + 1
        return self.ptr, self.clock[self.ptr]

    def begin_capture(self):
        if self is device.null:
            raise RuntimeError("cannot capture on the default (legacy) stream")
        self.capture = Capture(self)

    def end_capture(self):
        capture = self.capture
        if capture is None:
            raise CudaError("the stream does not capture")
        return capture.end(self)

    def is_capturing(self):
        return self.capture is not None

    def synchronize(self):
        device.wait_for_host(self)


def _merge(clock, other):
    for stream, tick in other.items():
        clock[stream] = max(tick, clock.get(stream, 0))


class Node:
    """A captured launch: what it computes, and by address what of."""

    def __init__(self, name, run, inputs, outputs, written, stream):
        self.name, self.run = name, run
        self.inputs = [Address(x) for x in inputs]
        self.outputs = [Address(y) for y in outputs]
        self.written = [self.inputs[i] for i in written] + self.outputs
        self.touched = self.inputs + self.outputs
        self.stamp, self.clock = stream._tick(), None
        self.clock = dict(stream.clock)

    def launch(self):
        with np.errstate(all="ignore"):
            found = self.run(*[x.array() for x in self.inputs])
        for address, value in zip(self.outputs, _leaves(found), strict=bool(self.outputs)):
            address.array()[...] = value


class Address:
    """Where an array lies, without keeping it."""

    def __init__(self, array):
        handle = handle_of(array)
        self.storage = handle.storage
        self.handle = weakref.ref(handle)
        self.shape, self.strides, self.dtype = array.shape, array.strides, array.dtype
        first = np.ndarray.__array_interface__.__get__(array)["data"][0]
        start = np.frombuffer(self.storage.bytes, np.uint8).__array_interface__["data"][0]
        self.offset = first - start
        reach = [(n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)]
        self.low = self.offset + sum(r for r in reach if r < 0)
        self.high = self.offset + sum(r for r in reach if r > 0) + self.dtype.itemsize
        if 0 in self.shape:
            self.high = self.low

    def array(self):
        storage = self.storage.bytes
        return np.ndarray(self.shape, self.dtype, storage, self.offset, self.strides)

    def covers(self, touched):
        return self.low <= touched[0] and touched[1] <= self.high

    def meets(self, other):
        same = self.storage is other.storage
        return same and self.low < other.high and other.low < self.high


class Capture:
    """What streams record from `begin_capture` to `end_capture`."""

    def __init__(self, origin):
        self.origin = origin
        self.streams = [origin]
        self.nodes = []
        self.problem = None
        self.ended = False
        self.before = {}
        pool = getattr(device.allocators[-1], "__self__", None) if device.allocators else None
        self.pool = pool

    def join(self, stream):
        stream.capture = self
        self.streams.append(stream)

    def refuse(self, what):
        """CUDA ends a capture in which something illegal is done, and says so then and later."""
        self.problem = self.problem or what
        raise CudaError(f"{what} while a stream captures")

    def misses(self, what):
        """Note that something was freed which the capture has seen."""
        if not self.ended:
            self.problem = self.problem or f"{what} was freed before the end"

    def save(self, storage):
        if id(storage) not in self.before:
            self.before[id(storage)] = storage, bytes(storage.bytes)

    def end(self, stream):
        self.ended = True
        for member in self.streams:
            member.capture = None
        for storage, content in self.before.values():
            mine = self.pool is not None and storage.pool() is self.pool
            storage.bytes[:] = b"\xff" * len(content) if mine else content
        if stream is not self.origin:
            raise CudaError("the capture was begun on another stream")
        if self.problem is not None:
            raise CudaError(f"the capture is invalid: {self.problem}")
        for member in self.streams:
            tick = member.clock.get(member.ptr, 0)
            if self.origin.clock.get(member.ptr, 0) < tick:
                raise CudaError("the capture has a stream that did not come back")
        self._look_for_races()
        if self.pool is not None:
            self.pool.sealed = True
        return Graph(self)

    def _look_for_races(self):
        for i, later in enumerate(self.nodes):
            for earlier in self.nodes[:i]:
                stream, tick = earlier.stamp
                if later.clock.get(stream, 0) >= tick:
                    continue
                for first, then in ((earlier, later), (later, earlier)):
                    if any(w.meets(t) for w in first.written for t in then.touched):
                        raise CudaError(
                            f"a race: {first.name} writes what {then.name} uses on another stream"
                        )


class Graph:
    """Captured launches; it owns no memory."""

    def __init__(self, capture):
        self._nodes = capture.nodes
        self._pool = None if capture.pool is None else weakref.ref(capture.pool)
        device.graphs.append(weakref.ref(self))

    def launch(self, stream=None):
        stream = stream or device.stream
        device.launched_graphs += 1
        if device.fails_to_launch:
            raise CudaError("the graph could not be launched")
        private = None if self._pool is None else self._pool()
        if self._pool is not None and private is None:
            raise CudaError("the graph's pool is gone")
        if stream.capture is not None:
            stream.capture.refuse("a graph is launched")
        reads, writes = [], []
        for node in self._nodes:
            for address in node.touched:
                outside = private is None or address.storage.pool() is not private
                if outside and address.handle() is None:
                    raise CudaError(f"{node.name} touches memory that was given back")
            reads += node.inputs
            writes += node.written
        device.touch(stream, "the graph", reads, writes)
        for node in self._nodes:
            node.launch()


WAITING = {"argsort", "nonzero", "sort"}  # what CuPy waits for: Thrust's sorts, and counts


class Device:
    """The state of the device and of the threads that use it."""

    def __init__(self):
        self.null = Stream(null=True)
        self.pool = MemoryPool()
        self.host_clock = {}
        self.host_reads = 0
        self.copies = {}  # to the host, that it has not waited for: by their stamps
        self.launches = 0
        self.launched_graphs = 0
        self.fails_to_launch = False
        self.checks = True  # of the order between streams, outside captures
        self.graphs = []
        self.given_out = weakref.WeakValueDictionary()  # storages by their first address
        self._local = threading.local()

    @property
    def streams(self):
        if not hasattr(self._local, "streams"):
            self._local.streams = [self.null]
        return self._local.streams

    @property
    def stream(self):
        return self.streams[-1]

    @property
    def allocators(self):
        if not hasattr(self._local, "allocators"):
            self._local.allocators = []
        return self._local.allocators

    @_by_one_thread
    def wait_for_host(self, stream):
        if stream.capture is not None:
            stream.capture.refuse("the host waits for a stream")
        _merge(self.host_clock, stream.clock)
        for (other, tick), copy in list(self.copies.items()):
            if self.host_clock.get(other, 0) >= tick:
                copy()
                del self.copies[other, tick]

    @_by_one_thread
    def touch(self, stream, name, reads, writes):
        """Check that what is read was written before, and what is written is needed no more."""
        clock = dict(stream.clock)
        _merge(clock, self.host_clock)

        def check(address, touched, what):
            for low, high, (other, tick) in touched:
                if low < address.high and address.low < high and clock.get(other, 0) < tick:
                    raise CudaError(f"{name} {what} on another stream, and did not wait for that")

        for address in reads if self.checks else ():
            check(address, address.storage.written, "reads what is written")
        for address in writes if self.checks else ():
            check(address, address.storage.written, "writes what is written")
            check(address, address.storage.read, "writes what is read")
        stamp = stream._tick()
        for address in reads:
            read = address.storage.read
            read[:] = [x for x in read if x[2][0] != stamp[0] or not address.covers(x)]
            read.append((address.low, address.high, stamp))
        for address in writes:
            for touched in (address.storage.written, address.storage.read):
                touched[:] = [x for x in touched if not address.covers(x)]
            address.storage.written.append((address.low, address.high, stamp))

    def empty(self, shape, dtype):
        dtype = np.dtype(float if dtype is None else dtype)
        shape = (shape,) if isinstance(shape, (int, np.integer)) else tuple(shape)
        malloc = self.allocators[-1] if self.allocators else self.pool.malloc
        handle = malloc(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
        return np.ndarray.__new__(FakeArray, shape, dtype, buffer=handle)

    def call(self, name, function, args, options=None, writes=None):
        """Launch `function(*args, **options)`; `writes` are the arrays that it writes, if any."""
        if name in WAITING:
            self.wait_for_host(self.stream)
        inputs = []
        template = _taken((args, options or {}), inputs)

        def run(*arrays):
            filled_args, filled_options = _filled(template, arrays)
            return function(*filled_args, **filled_options)

        written = [i for i, x in enumerate(inputs) if any(x is w for w in writes or ())]
        return self.run(name, run, inputs, written, writes is not None)

    def run(self, name, run, inputs, written, in_place):
        stream, capture = self.stream, self.stream.capture
        if capture is not None and not gc.isenabled():
            for i in written:
                capture.save(handle_of(inputs[i]).storage)
        elif capture is not None:
            raise CudaError("the garbage collector may run while a stream captures")
        with np.errstate(all="ignore"):
            found = run(*[_plain_view(x) for x in inputs])
        outputs = []
        answer = None if in_place else self._given(found, outputs)
        if outputs or in_place:
            self.launches += 1
            if capture is not None:
                capture.nodes.append(Node(name, run, inputs, outputs, written, stream))
            else:
                read, new = ([Address(x) for x in arrays] for arrays in (inputs, outputs))
                self.touch(stream, name, read, [read[i] for i in written] + new)
        return answer

    def _given(self, value, outputs):
        """Return what NumPy has computed as arrays of the device; new ones join the outputs."""
        if isinstance(value, (list, tuple)):
            parts = [self._given(each, outputs) for each in value]
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        if not isinstance(value, (np.ndarray, np.generic)):
            return value
        if handle_of(value) is not None:  # a view: nothing is launched
            return np.ndarray.view(value, FakeArray)
        y = self.empty(np.shape(value), value.dtype)
        if self.stream.capture is not None:
            self.stream.capture.save(handle_of(y).storage)
        _plain_view(y)[...] = value
        outputs.append(y)
        return y

    def kernel(self, name, launch, arrays):
        """Launch a kernel that writes to some of its arrays: those that change."""
        before = [_plain_view(x).tobytes() for x in arrays]
        capture = self.stream.capture
        if capture is not None:
            for x in arrays:
                capture.save(handle_of(x).storage)

        def run(*views):
            launch(views)

        run(*[_plain_view(x) for x in arrays])
        changed = [i for i, x in enumerate(arrays) if _plain_view(x).tobytes() != before[i]]
        self.run(name, lambda *_: None, arrays, changed, in_place=True)
        if capture is not None:
            capture.nodes[-1].run = run

    def array_at(self, address, shape, dtype, strides=None):
        """Return what lies at an address, as a library is told of arrays."""
        for first, storage in list(self.given_out.items()):
            handle = storage.handle()
            if handle is not None and first <= address < first + len(storage.bytes):
                buffer = np.ndarray.view(handle, np.ndarray), address - first
                np.ndarray(shape, dtype, *buffer, strides)  # within its memory
                return np.ndarray.__new__(FakeArray, shape, dtype, handle, address - first, strides)
        raise CudaError(f"a launch is given the address {address:#x}, where nothing lies")

    def to_host(self, array):
        """Copy an array to the host, which waits for its stream."""
        if self.stream.capture is None:
            self.touch(self.stream, "a copy to the host", [Address(array)], [])
        self.wait_for_host(self.stream)
        self.host_reads += 1
        return np.array(_plain_view(array))

    def to_pinned(self, stream, array, out):
        """Copy an array to pinned memory, where it is once the host has waited for its stream."""
        if not isinstance(getattr(out.base, "obj", None), Pinned):
            raise CudaError("a copy that is not waited for goes to memory that is not pinned")
        if stream.capture is not None:
            stream.capture.refuse("an array is copied to the host")
        self.touch(stream, "a copy to the host", [Address(array)], [])
        values = np.array(_plain_view(array))
        self.copies[stream.ptr, stream.clock[stream.ptr]] = lambda: np.copyto(out, values)

    def from_host(self, value, dtype=None):
        """Copy NumPy's values to the device."""
        value = np.asarray(value, dtype)
        if self.stream.capture is not None and value.ndim:
            self.stream.capture.refuse("an array is copied from the host")
        y = self.empty(value.shape, value.dtype)
        self.call("fill", np.copyto, (y, value[()] if not value.ndim else _Host(value)), writes=[y])
        return y


class Pinned(bytearray):
    """Memory of the host that a device may write to."""


class _Host:
    """Lets an array of the host pass, where it is copied to the device."""

    def __init__(self, array):
        self.array = array


class _Slot:
    def __init__(self, position):
        self.position = position


def _taken(value, found):
    """Return the arguments with a slot for each array of the device; others are refused."""
    if isinstance(value, FakeArray):
        found.append(value)
        return _Slot(len(found) - 1)
    if isinstance(value, np.ndarray):
        raise TypeError(f"Unsupported type {type(value)}")
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)([_taken(each, found) for each in value])
    if isinstance(value, dict):
        return {key: _taken(each, found) for key, each in value.items()}
    return value


def _filled(template, arrays):
    if isinstance(template, _Slot):
        return arrays[template.position]
    if isinstance(template, _Host):
        return template.array
    if isinstance(template, (list, tuple)) and not hasattr(template, "_fields"):
        return type(template)([_filled(each, arrays) for each in template])
    if isinstance(template, dict):
        return {key: _filled(each, arrays) for key, each in template.items()}
    return template


def _leaves(value):
    if isinstance(value, (list, tuple)):
        return [leaf for each in value for leaf in _leaves(each)]
    return [value] if isinstance(value, (np.ndarray, np.generic)) else []


def _plain_view(array):
    return np.ndarray.view(array, np.ndarray)


def handle_of(array):
    while isinstance(array, np.ndarray):
        if type(array) is Handle:
            return array
        array = array.base
    return None


class FakeArray(np.ndarray):
    """An array of the stand-in: 0-d results are arrays, and NumPy's arrays are refused."""

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **options):
        if out is not None:
            options["out"] = out
        function = getattr(ufunc, method)
        writes = [x for x in out or () if x is not None] or None
        if method == "at":
            writes = [inputs[0]]
        answer = device.call(ufunc.__name__, function, inputs, options, writes)
        return out[0] if out is not None else answer

    def __array_function__(self, function, kinds, inputs, options):
        return device.call(function.__name__, function, inputs, options)

    def __getitem__(self, index):
        parts = index if isinstance(index, tuple) else (index,)
        _wait_for_masks(parts)
        if not any(hasattr(part, "dtype") or isinstance(part, list) for part in parts):
            index = parts if any(part is Ellipsis for part in parts) else (*parts, Ellipsis)
        return device.call("getitem", lambda x, i: x[i], (self, index))

    def __setitem__(self, index, value):
        def write(x, i, y):
            x[i] = y

        _wait_for_masks(index if isinstance(index, tuple) else (index,))
        device.call("setitem", write, (self, index, value), writes=[self])

    def __array__(self, dtype=None, copy=None):
        raise TypeError("Implicit conversion to a NumPy array is not allowed.")

    def fill(self, value):
        device.call("fill", np.ndarray.fill, (self, value), writes=[self])

    def get(self, stream=None, out=None, blocking=True):
        if out is None:
            return device.to_host(self)
        device.to_pinned(stream or device.stream, self, out)
        assert not blocking, "nobody asks for this"
        return out

    def item(self, *index):
        return device.to_host(self).item(*index)

    def tolist(self):
        return device.to_host(self).tolist()

    def __bool__(self):
        return bool(device.to_host(self))

    def __int__(self):
        return int(device.to_host(self))

    def __index__(self):
        return device.to_host(self).__index__()

    def __float__(self):
        return float(device.to_host(self))

    @property
    def data(self):
        address = _plain_view(self).__array_interface__["data"][0]
        return types.SimpleNamespace(ptr=address, device_id=0)

    @property
    def device(self):
        return "<CUDA Device 0>"


def _wait_for_masks(index):
    """Wait for the device where an index is boolean: how many places it has is asked there."""
    if any(isinstance(part, FakeArray) and part.dtype == bool for part in index):
        device.wait_for_host(device.stream)


METHODS = (
    "all any argmax argmin argsort astype clip conj copy cumprod cumsum diagonal dot flatten max "
    "mean min nonzero prod ravel repeat reshape round searchsorted std sum take trace var"
)
for _name in METHODS.split():

    def _method(self, *inputs, _name=_name, **options):
        def function(x, *args, **kwargs):
            return getattr(x, _name)(*args, **kwargs)

        out = options.get("out")
        if out is not None and out.ndim > 1 and not self.flags.c_contiguous:
            raise CudaError("CuPy may give `out` the strides of what it reduces")
        answer = device.call(
            _name, function, (self, *inputs), options, None if out is None else [out]
        )
        return answer if out is None else out

    setattr(FakeArray, _name, _method)
FakeArray.__name__, FakeArray.__module__ = "ndarray", "cupy"


class FakeCupy(types.ModuleType):
    """The module: NumPy's functions on the stand-in's arrays, and `cuda`."""

    ndarray = FakeArray
    __version__ = "14.0.0"

    def __init__(self):
        super().__init__("cupy")
        self.cuda = types.SimpleNamespace(
            Event=Event,
            MemoryPool=MemoryPool,
            Stream=Stream,
            alloc_pinned_memory=lambda size: Pinned(b"\x7f" * size),
            get_current_stream=lambda: device.stream,
            memory=types.SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
            runtime=types.SimpleNamespace(
                getDeviceCount=lambda: 1,
                streamIsCapturing=lambda stream: device.stream.capture is not None,
            ),
            using_allocator=_using_allocator,
        )

    @property
    def device(self):
        return device

    def get_default_memory_pool(self):
        return device.pool

    def empty(self, shape, dtype=float):
        return device.empty(shape, dtype)

    def empty_like(self, array):
        return device.empty(array.shape, array.dtype)

    def asarray(self, value, dtype=None):
        if isinstance(value, FakeArray):
            return value if dtype is None else value.astype(dtype, copy=False)
        return device.from_host(value, dtype)

    def array(self, value, dtype=None, copy=True):
        if isinstance(value, FakeArray):
            return value.astype(value.dtype if dtype is None else dtype, copy=copy)
        return device.from_host(value, dtype)

    def concatenate(self, arrays, axis=0):
        return self._joined("concatenate", arrays, axis)

    def stack(self, arrays, axis=0):
        return self._joined("stack", arrays, axis)

    def _joined(self, name, arrays, axis):
        if len(arrays) > 8:  # then their addresses go to the device as an array
            device.from_host(np.arange(len(arrays)))
        return device.call(name, getattr(np, name), (list(arrays),), {"axis": axis})

    def matmul(self, x, w, out=None):
        if max(x.ndim, w.ndim) > 2 and x.dtype.name == "bfloat16":  # CuPy's issue 10317
            raise TypeError(f"Unsupported dtype {x.dtype}")
        answer = device.call(
            "matmul", np.matmul, (x, w), {"out": out}, None if out is None else [out]
        )
        return answer if out is None else out

    def copyto(self, target, value):
        device.call("copyto", np.copyto, (target, value), writes=[target])

    def __getattr__(self, name):
        value = getattr(np, name)
        if isinstance(value, type) or not callable(value):
            return value

        def function(*inputs, **options):
            out = options.get("out")
            if isinstance(value, np.ufunc) and len(inputs) > value.nin:
                out = inputs[value.nin]
            answer = device.call(name, value, inputs, options, None if out is None else [out])
            return answer if out is None else out

        return function


@contextlib.contextmanager
def _using_allocator(allocator):
    device.allocators.append(allocator)
    try:
        yield
    finally:
        device.allocators.pop()


device = Device()
