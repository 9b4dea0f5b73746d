"""Loading and launching the CUDA C++ kernels."""

from __future__ import annotations

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from _cupy import EditableInstall, FakeCupy, on_cuda

import repsim_kernels
from repsim_kernels.kernels.cupy import module

NVCC = shutil.which("nvcc")
CODE = 'extern "C" __global__ void double_it(float* x) { x[threadIdx.x] *= 2; }\n'


@pytest.fixture
def cupy(monkeypatch):
    """A CuPy that only records calls, and a PyTorch that sees two GPUs."""
    fake = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"torch's on {device}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    module._load_kernel.cache_clear()
    yield fake
    module._load_kernel.cache_clear()


@pytest.fixture
def install(tmp_path, monkeypatch):
    install = EditableInstall(tmp_path, CODE)
    monkeypatch.setattr(repsim_kernels, "__path__", [str(install.site), str(install.checkout)])
    return install


def load_options(cupy: FakeCupy) -> dict[str, object]:
    """Return what CuPy loads for a launch on the second GPU."""
    module._load_kernel.cache_clear()
    cupy.loaded.clear()
    module.launch("toy", "double_it", (1,), (3,), on_cuda(1, 2, 3))
    (options,) = cupy.loaded
    return options


def nvrtc_options(code: str) -> dict[str, object]:
    return {"code": code, "backend": "nvrtc", "options": ("-std=c++17",)}


def test_fatbin_of_the_current_source_is_loaded(cupy, install):
    install.build()
    assert load_options(cupy) == {"path": str(install.fatbin)}
    assert module.describe_build() == "fatbin for sm_80, sm_90, sm_100"


def test_without_a_fatbin_nvrtc_compiles_the_source(cupy, install):
    assert load_options(cupy) == nvrtc_options(CODE)
    install.source.with_name("another.cu").write_text(CODE)
    assert module.describe_build() == (
        "NVRTC at first use: no fatbin was built (there was no nvcc, or REPSIM_CUDA=OFF)"
    )


def test_an_edited_source_is_compiled_by_nvrtc(cupy, install):
    install.build()
    edited = CODE.replace("2", "3")
    install.source.write_text(edited)
    assert load_options(cupy) == nvrtc_options(edited)
    assert (
        module.describe_build()
        == "NVRTC at first use: toy.cu is not what the fatbin was built from"
    )
    install.source.write_text(CODE)
    assert load_options(cupy) == {"path": str(install.fatbin)}


def test_a_new_source_is_compiled_by_nvrtc(cupy, install):
    install.build()
    new = install.source.with_name("new.cu")
    new.write_text(CODE)
    module.launch("new", "double_it", (1,), (3,), on_cuda(1))
    assert cupy.loaded == [nvrtc_options(CODE)]
    assert (
        module.describe_build()
        == "NVRTC at first use: new.cu is not what the fatbin was built from"
    )


@pytest.mark.parametrize(
    ("capability", "runs"),
    [
        ((7, 5), False),
        ((8, 0), True),
        ((8, 9), True),  # code for 8.0 runs on it
        ((9, 0), True),
        ((10, 0), True),
        ((10, 3), True),
        ((12, 0), True),  # from PTX
    ],
)
def test_devices_the_fatbin_covers(cupy, install, monkeypatch, capability, runs):
    install.build()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert load_options(cupy) == ({"path": str(install.fatbin)} if runs else nvrtc_options(CODE))
    name = "sm_{}{}".format(*capability)
    assert (
        f"NVRTC at first use: the fatbin has no code for {name}" == module.describe_build()
    ) != runs


@pytest.mark.parametrize("architectures", [(100,), (80, 100)])
def test_a_device_older_than_the_fatbin_needs_nvrtc(cupy, install, architectures):
    install.build(architectures=architectures)
    assert load_options(cupy) == nvrtc_options(CODE)


@pytest.mark.parametrize(
    ("driver", "nvcc", "runs"),
    [
        (13_000, "13.0.88", True),
        (13_010, "13.0.88", True),
        (13_000, "13.1.12", False),
        (13_010, "13.2.5", False),
        (12_090, "13.0.88", False),
        (13_000, "12.9.86", True),
    ],
)
def test_driver_versions(cupy, install, driver, nvcc, runs):
    install.build(nvcc=nvcc)
    cupy.driver = driver
    assert ("path" in load_options(cupy)) == runs
    assert ("the driver is older than CUDA 1" in module.describe_build()) != runs


def test_description_without_a_device(install, monkeypatch):
    monkeypatch.setattr(module, "unsupported", lambda: "there is no CUDA device")
    install.build()
    assert module.describe_build() == "fatbin for sm_80, sm_90, sm_100"


def test_launch(cupy, install):
    x, y = on_cuda(1, 2), on_cuda(3, 4)
    scalars = np.int32(-7), np.int64(2**40), np.float32(0.5), np.float64(0.25)
    module.launch("toy", "double_it", (3, 2), (128,), x, *scalars, y, shared=100_000)
    *before, launch = cupy.events[:4]
    assert before == [
        ("device", 1, "enter"),
        ("stream", "torch's on cuda:1", "enter"),
        ("load", "double_it"),
    ]
    assert cupy.events[4:] == [
        ("stream", "torch's on cuda:1", "exit"),
        ("device", 1, "exit"),
    ]
    kind, name, grid, block, arguments, shared, limit = launch
    assert (kind, name, grid, block, shared) == ("launch", "double_it", (3, 2), (128,), 100_000)
    assert arguments == (x.data_ptr(), *scalars, y.data_ptr())
    types = [np.uint64, np.int32, np.int64, np.float32, np.float64, np.uint64]
    assert [type(value) for value in arguments] == types
    assert limit == 227 * 1024 - 448  # the limit per block, less the kernel's static memory


def test_a_kernel_is_loaded_once_per_device(cupy, install):
    for index in (0, 1, 0, 1):
        module.launch("toy", "double_it", (1,), (32,), on_cuda(1, index=index))
    module.launch("toy", "another", (1,), (32,), on_cuda(1))
    events = [event for event in cupy.events if event[0] in ("load", "launch")]
    names = [event[:2] for event in events]
    load, launch = ("load", "double_it"), ("launch", "double_it")
    other = [("load", "another"), ("launch", "another")]
    assert names == [load, launch, load, launch, launch, launch, *other]


def test_empty_grid_starts_nothing(cupy, install):
    """CuPy would start one block."""
    module.launch("toy", "double_it", (4, 0), (32,), on_cuda(1))
    assert cupy.events == []


@pytest.mark.parametrize("grid", [(2**31,), (1, 65_536), (1, 1, 65_536)])
def test_grids_beyond_the_limits_are_refused(cupy, install, grid):
    with pytest.raises(ValueError, match=r"double_it: \d+ blocks along [xyz]; expected 0 to \d+"):
        module.launch("toy", "double_it", grid, (32,), on_cuda(1))
    assert cupy.events == []


@pytest.mark.parametrize("value", [7, 0.5, True, None, [1], np.ones(1)])
def test_arguments_without_a_c_type(cupy, install, value):
    with pytest.raises(TypeError, match="expected a tensor or a NumPy scalar"):
        module.launch("toy", "double_it", (1,), (32,), on_cuda(1), value)
    assert cupy.events == []


def test_supported_tensors(cupy):
    assert module.unsupported() is None
    assert module.unsupported(on_cuda(1), on_cuda(2)) is None
    assert module.unsupported(on_cuda(1), torch.ones(1)) == "it needs CUDA tensors, not cpu"
    elsewhere = module.unsupported(on_cuda(1), on_cuda(2, index=0))
    assert elsewhere == "the tensors are on different devices"


def test_without_cupy(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert module.unsupported(torch.ones(1)) == "CuPy is not installed"


def test_without_a_gpu(cupy, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert module.unsupported(on_cuda(1)) == "there is no CUDA device"


def test_cupy_without_a_gpu(cupy):
    cupy.cuda.is_available = lambda: False
    assert module.unsupported(on_cuda(1)) == "CuPy finds no CUDA device"


def test_old_cupy(cupy):
    del cupy.cuda.Stream.from_external
    cupy.__version__ = "13.6.0"
    assert module.unsupported(on_cuda(1)) == "CuPy 13.6.0 is older than 14"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (
            "try:\n import no_such_library\n"
            "except ImportError as error: raise ImportError('=====\\n') from error",
            "ModuleNotFoundError: No module named 'no_such_library'",
        ),
        ("raise PermissionError('cache\\n  folder')", "PermissionError: cache folder"),
        ("import warnings; warnings.warn('two of them')", "UserWarning: two of them"),
    ],
)
def test_broken_cupy(monkeypatch, tmp_path, code, reason):
    (tmp_path / "cupy.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert module.unsupported(on_cuda(1)) == f"CuPy can't be imported: {reason}"


def gpu(test):
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    return pytest.mark.gpu(skip(test))


# A fused multiply-add, subnormal numbers, and dynamic shared memory.
ADD = """
extern "C" __global__ void add(float* x, long long n, float by) {
  extern __shared__ float tile[];
  const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  tile[threadIdx.x] = i < n ? x[i] : 0;
  __syncthreads();
  if (i < n) x[i] = tile[threadIdx.x] * 0.75f + by;
}
"""


def add(x: torch.Tensor, by: float, shared: int = 1024) -> None:
    """Replace x by 0.75 x + by, in place."""
    blocks = -(-len(x) // 256)
    module.launch(
        "toy", "add", (blocks,), (256,), x, np.int64(len(x)), np.float32(by), shared=shared
    )


@pytest.fixture(params=["fatbin", "NVRTC"])
def native(request, tmp_path, monkeypatch):
    """Install the kernel above, as a fatbin and for NVRTC."""
    pytest.importorskip("cupy", reason="CuPy is not installed")
    install = EditableInstall(tmp_path, ADD)
    monkeypatch.setattr(repsim_kernels, "__path__", [str(install.site), str(install.checkout)])
    module._load_kernel.cache_clear()
    if request.param == "fatbin":
        if NVCC is None:
            pytest.skip("no nvcc")
        options = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in (80, 90, 100)]
        options += ["-gencode=arch=compute_100,code=compute_100", "-ftz=true", "-std=c++17"]
        command = [NVCC, "-fatbin", *options, str(install.source), "-o", str(install.fatbin)]
        subprocess.run(command, check=True)
        process = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True)
        version = process.stdout.rpartition(", V")[2].split()[0]
        install.build(install.fatbin.read_bytes(), nvcc=version)
    assert module.describe_build().startswith(request.param)
    yield request.param
    module._load_kernel.cache_clear()


@gpu
def test_results_and_shared_memory(native):
    x = torch.linspace(-1, 1, 1000, device="cuda")
    x[:3] = torch.tensor([1e-40, -1e-40, 1e-38])
    expected = x.double() * 0.75
    by_default = x.clone()
    add(by_default, 0.0)
    large = x.clone()
    add(large, 0.0, shared=96 * 1024)
    assert torch.equal(by_default, large)
    assert by_default[:2].tolist() == [0, 0]  # both compilers flush subnormal numbers
    assert torch.allclose(by_default.double(), expected, rtol=1e-7, atol=1.2e-38)


@gpu
def test_kernels_run_on_the_stream_of_torch(native):
    import cupy

    before = cupy.cuda.get_current_stream()
    x = torch.zeros(1000, device="cuda")
    add(x, 0.0)  # load the kernel
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        x.fill_(4)
        add(x, 2.0)  # on another stream it would not have waited for the 4
    side.synchronize()
    assert (x == 5).all()
    assert cupy.cuda.get_current_stream() == before


@gpu
def test_device_that_is_not_current(native):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    for index in (1, 0):
        x = torch.zeros(1000, device=f"cuda:{index}")
        add(x, 1.0)
        assert (x == 1).all()
        assert torch.cuda.current_device() == 0


@gpu
def test_cupy_arrays_are_not_copied(native):
    import cupy

    x = cupy.zeros(1000, dtype=cupy.float32)
    cupy.cuda.get_current_stream().synchronize()
    add(torch.from_dlpack(x), 2.0)
    torch.cuda.synchronize()
    assert (x.get() == 2).all()


@gpu
def test_launch_in_a_graph(native):
    x = torch.zeros(1000, device="cuda")
    add(x, 1.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        add(x, 1.0)
    torch.cuda.synchronize()
    x.zero_()
    graph.replay()
    graph.replay()
    assert (x == 1.75).all()


@gpu
def test_shipped_kernels_load():
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    device = torch.cuda.current_device()
    sources = [path.stem for path in module._find_files("*.cu")]
    assert sources
    for source in sources:
        if module._why_not_fatbin(source, device) is None:
            cupy.RawModule(path=str(module._find_files(f"{source}.fatbin")[0])).compile()
        code = module._find_files(f"{source}.cu")[0].read_text(encoding="utf-8")
        cupy.RawModule(code=code, options=module.NVRTC_OPTIONS).compile()
