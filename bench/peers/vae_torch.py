"""A plain PyTorch decoder of Stable Diffusion 3's VAE in float32, for measuring against and nothing else.

Arguments: safetensors file, number of threads, rows and columns of the latent, calls. The latent is read from standard
input as float32. Writes a line of JSON: seconds of each call, the largest resident set before and after in bytes; then
the picture as float32.
"""

import json
import mmap
import math
import resource
import struct
import sys
import time

import torch
import torch.nn.functional as F

PREFIX = "first_stage_model.decoder."
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
GROUPS, EPS, SCALE, SHIFT = 32, 1e-6, 1.5305, 0.0609


def read_weights(path):
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    weights = {}
    for name, entry in header.items():
        if not name.startswith(PREFIX):
            continue
        offset = 8 + length + entry["data_offsets"][0]
        flat = torch.frombuffer(data, dtype=DTYPES[entry["dtype"]], count=math.prod(entry["shape"]), offset=offset)
        weights[name[len(PREFIX) :]] = flat.reshape(entry["shape"]).to(torch.float32, copy=True)
    return weights


class Decoder:
    def __init__(self, weights):
        self.w = weights
        self.levels = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("up."))
        self.blocks = 1 + max(int(name.split(".")[3]) for name in weights if name.startswith("up.0.block"))

    def conv(self, name, x):
        weight = self.w[name + ".weight"]
        return F.conv2d(x, weight, self.w[name + ".bias"], padding=weight.shape[-1] // 2)

    def norm(self, name, x):
        return F.group_norm(x, GROUPS, self.w[name + ".weight"], self.w[name + ".bias"], EPS)

    def block(self, name, x):
        y = self.conv(name + ".conv1", F.silu(self.norm(name + ".norm1", x)))
        y = self.conv(name + ".conv2", F.silu(self.norm(name + ".norm2", y)))
        return y + (self.conv(name + ".nin_shortcut", x) if name + ".nin_shortcut.weight" in self.w else x)

    def attention(self, name, x):
        normal = self.norm(name + ".norm", x)
        q, k, v = (self.conv(f"{name}.{part}", normal).flatten(2).transpose(1, 2)[:, None] for part in "qkv")
        y = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        return x + self.conv(name + ".proj_out", y)

    def __call__(self, latent):
        x = self.conv("conv_in", latent / SCALE + SHIFT)
        x = self.block("mid.block_2", self.attention("mid.attn_1", self.block("mid.block_1", x)))
        for level in reversed(range(self.levels)):
            for block in range(self.blocks):
                x = self.block(f"up.{level}.block.{block}", x)
            if level > 0:
                x = self.conv(f"up.{level}.upsample.conv", F.interpolate(x, scale_factor=2, mode="nearest"))
        return self.conv("conv_out", F.silu(self.norm("norm_out", x)))


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main():
    file, threads, rows, columns, calls = sys.argv[1], *map(int, sys.argv[2:6])
    torch.set_num_threads(threads)
    decoder = Decoder(read_weights(file))
    channels = decoder.w["conv_in.weight"].shape[1]
    values = bytearray(sys.stdin.buffer.read(4 * channels * rows * columns))
    latent = torch.frombuffer(values, dtype=torch.float32).reshape(1, channels, rows, columns)
    before = peak()
    seconds = []
    with torch.inference_mode():
        for _ in range(calls):
            start = time.perf_counter()
            image = decoder(latent)
            seconds.append(time.perf_counter() - start)
    report = {"torch": torch.__version__, "seconds": seconds, "before": before, "peak": peak()}
    sys.stdout.buffer.write((json.dumps(report) + "\n").encode())
    sys.stdout.buffer.write(bytes(image.contiguous().flatten().untyped_storage()))


main()
