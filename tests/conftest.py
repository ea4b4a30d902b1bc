"""Every test sees eight CPU devices, so that meshes of several shapes run on any machine."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
