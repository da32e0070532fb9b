"""What is known of a TensorCore of each generation."""

import dataclasses

import meshes

_NEW = ("TPU v6 lite", "TPU7x")
_DELAY_SLOTS = {"TPU v4": 1, "TPU v5 lite": 4, "TPU v5": 4, "TPU v6 lite": 4, "TPU7x": 6}


@dataclasses.dataclass(frozen=True)
class Core:
    """One TensorCore.

    Attributes:
      device_kind: as JAX calls the device that it belongs to.
      clock_hz: cycles per second. It follows from the chip's peak rate: 4 MXUs per core, each 128
        or (from v6e on) 256 square, and 2 flops per place and cycle.
      flops_per_cycle: of its matrix units, in bfloat16.
      bytes_per_s: its share of the chip's HBM bandwidth.
      delay_slots: bundles that still issue after a branch; found from compiled programs.
      granule: bytes in which the sizes of its copies are counted.
    """

    device_kind: str
    clock_hz: float
    flops_per_cycle: int
    bytes_per_s: float
    delay_slots: int
    granule: int

    @classmethod
    def of(cls, device_kind: str) -> "Core":
        """The core of a kind of device.

        Raises:
          ValueError: if it is no TPU that is known.
        """
        chip = meshes.Chip.of_kind(device_kind)
        if chip is None or device_kind not in _DELAY_SLOTS:
            raise ValueError(f"no core of {device_kind!r} is known; known are {[*_DELAY_SLOTS]}")
        side = 256 if device_kind in _NEW else 128
        flops_per_cycle = 2 * 4 * side**2
        return cls(
            device_kind,
            clock_hz=chip.bf16_tflops * 1e12 / (flops_per_cycle * chip.cores),
            flops_per_cycle=flops_per_cycle,
            bytes_per_s=chip.hbm_gbps * 1e9 / chip.cores,
            delay_slots=_DELAY_SLOTS[device_kind],
            granule=512 if device_kind == "TPU v4" else 32,
        )
