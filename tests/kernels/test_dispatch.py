"""Choosing an implementation: what is preferred, refused, named; and whose platform counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh

from kernels import dispatch

PREFERRED = {"a TPU": ("pallas_tpu",), "a GPU": ("pallas_gpu",)}


def device(platform, kind=None):
    kind = kind or {"tpu": "a TPU", "cuda": "a GPU"}.get(platform, "a kind")
    return jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform=platform)


def traced(function, mesh):
    """What `function()` says inside jit under the mesh."""
    seen = []

    def body(x):
        seen.append(function())
        return x

    with mesh:
        jax.eval_shape(jax.jit(body), 0.0)
    return seen[0]


def abstract(platform, **kwargs):
    mesh = AbstractMesh((1,), ("data",), abstract_device=device(platform, **kwargs))
    return jax.sharding.use_abstract_mesh(mesh)


def test_the_platform_is_the_target_of_the_trace():
    assert dispatch.platform() == jax.default_backend()
    assert dispatch.device_kind() == jax.devices()[0].device_kind
    assert traced(dispatch.platform, abstract("tpu")) == "tpu"
    assert traced(dispatch.platform, abstract("cuda")) == "gpu"
    assert traced(dispatch.device_kind, abstract("cuda", kind="NVIDIA H200")) == "NVIDIA H200"
    unnamed = jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",)))
    assert traced(dispatch.platform, unnamed) == jax.default_backend()
    concrete = jax.set_mesh(Mesh(np.array(jax.devices()[:1]), ("data",)))
    assert traced(dispatch.platform, concrete) == jax.default_backend()


def test_an_open_choice_takes_what_is_preferred_and_falls_back():
    choose = lambda refusals: lambda: dispatch.choose("op", None, refusals, PREFERRED)  # noqa: E731
    assert traced(choose({}), abstract("tpu")) == "pallas_tpu"
    assert traced(choose({}), abstract("cuda")) == "pallas_gpu"
    assert traced(choose({}), abstract("cpu")) == "xla"
    assert traced(choose({}), abstract("cuda", kind="another GPU")) == "xla"
    assert traced(choose({"pallas_tpu": "no"}), abstract("tpu")) == "xla"


def test_a_named_one_runs_or_says_why_not():
    assert dispatch.choose("op", "pallas_gpu", {}, {}) == "pallas_gpu"
    with pytest.raises(ValueError, match="op: .*'pallas_tpu' cannot run: h is odd"):
        dispatch.choose("op", "pallas_tpu", {"pallas_tpu": "h is odd"}, PREFERRED)
    with pytest.raises(ValueError, match="must be one of"):
        dispatch.choose("op", "cudnn", {}, PREFERRED)


def test_kernels_run_on_their_platform_or_interpreted():
    assert dispatch.cannot_run_here(True, 3) == {}
    on_tpu = traced(lambda: dispatch.cannot_run_here(False, 4), abstract("tpu"))
    assert on_tpu == {"pallas_gpu": dispatch.cannot_run_here(False, 4)["pallas_gpu"].replace(
        f"the target is a {jax.default_backend()}", "the target is a tpu")}  # fmt: skip
    assert set(dispatch.cannot_run_here(False, 4)) == {"pallas_tpu", "pallas_gpu"}
    asked = lambda: dispatch.cannot_run_here(False, 4)  # noqa: E731
    assert "pallas_gpu" not in traced(asked, abstract("cuda", kind="NVIDIA H200"))
    for name in ("rocm", "gpu"):  # as a topology calls itself, and a device at hand
        of_amd = traced(asked, abstract(name, kind="AMD Instinct MI300X"))
        assert "NVIDIA" in of_amd["pallas_gpu"]


def test_a_mesh_that_xla_would_partition_is_refused_unless_manual():
    automatic = (AxisType.Auto,) * 2
    mesh = AbstractMesh((2, 1), ("data", "model"), automatic, abstract_device=device("tpu"))
    seen = traced(lambda: dispatch.cannot_run_here(False, 4), jax.sharding.use_abstract_mesh(mesh))
    assert "jax.shard_map" in seen["pallas_tpu"] and "a gpu" in seen["pallas_gpu"]

    seen = []

    def body(x):
        seen.append(dispatch.cannot_run_here(False, 4))
        return x

    spec, shape = jax.P("data"), jax.ShapeDtypeStruct((4,), jnp.float32)
    with jax.sharding.use_abstract_mesh(mesh):
        jax.eval_shape(jax.shard_map(body, in_specs=spec, out_specs=spec), shape)
    assert set(seen[0]) == {"pallas_gpu"}


def test_a_scope_chooses_where_no_implementation_is_named():
    def choose(name=None, refusals=None):
        return dispatch.choose("op", name, refusals or {}, PREFERRED)

    with abstract("tpu"), dispatch.scope("xla"):
        assert choose() == "xla" and choose("pallas_tpu") == "pallas_tpu"
        with dispatch.scope("pallas"):
            assert choose() == "pallas_tpu" and choose("xla") == "xla"
            with pytest.raises(dispatch.CannotRun, match="op: .*'pallas_tpu' cannot run: h is odd"):
                choose(refusals={"pallas_tpu": "h is odd"})
        with dispatch.scope("auto"):
            assert choose() == "pallas_tpu"
            assert choose(refusals={"pallas_tpu": "h is odd"}) == "xla"
        assert choose() == "xla"
    with abstract("cuda"), dispatch.scope("pallas"):
        assert choose() == "pallas_gpu"


def test_kernels_that_do_not_exist_or_are_not_called_are_one_line():
    for kernels, says in (("pallas", "target is a cpu; choose 'xla'"), ("cudnn", "auto, xla, pal")):
        with pytest.raises(dispatch.CannotRun, match=says), abstract("cpu"):
            with dispatch.scope(kernels):
                raise AssertionError("not refused")
    with pytest.raises(dispatch.CannotRun, match="has no kernels"), abstract("tpu"):
        with dispatch.scope("pallas"):
            dispatch.choose("op", "xla", {}, PREFERRED)
    assert dispatch.choose("op", None, {}, {}) == "xla"  # what a scope that raised leaves behind


def test_the_scope_names_the_axes_of_the_batch():
    mesh = AbstractMesh((4, 2), ("data", "model"), (AxisType.Auto,) * 2)
    with jax.sharding.use_abstract_mesh(mesh):
        assert dispatch.request_axes() == ()
        with dispatch.scope("auto", ("data",)):
            assert dispatch.request_axes() == ("data",)
            assert "do not divide" in dispatch.cannot_run_here(True, 6)["pallas_gpu"]
            assert dispatch.cannot_run_here(True, 8) == {}


def test_block_sizes_take_the_smallest_bucket_that_holds_the_length():
    table = {
        ("TPU v5 lite", "float32", 128): "small",
        ("TPU v5 lite", "float32", 1024): "large",
        ("TPU v5 lite", "bfloat16", 1024): "half",
    }

    def sizes(kind, dtype, length):
        return dispatch.block_sizes(table, kind, dtype, length, "default")

    assert sizes("TPU v5 lite", jnp.float32, 1) == sizes("TPU v5 lite", np.float32, 128) == "small"
    assert sizes("TPU v5 lite", "float32", 129) == "large"
    assert sizes("TPU v5 lite", jnp.bfloat16, 7) == "half"
    assert (
        sizes("TPU v5 lite", jnp.float32, 1025) == sizes("TPU v6 lite", jnp.float32, 1) == "default"
    )
