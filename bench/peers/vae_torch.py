"""A plain PyTorch VAE of Stable Diffusion 3, for measuring against and nothing else: the project itself needs no Python.

Reads one JSON request a line from standard input and answers with one line each:
  {"op": "load", "file": PATH}                              weights (float32) of a safetensors file
  {"op": "decode", "input": TENSOR, "calls": N}             seconds of each call, the picture, the peak memory
  {"op": "encode", "input": TENSOR, "calls": N}             the same with the moments
Tensors are {"shape": [...], "values": base64 of float32}; memory is in bytes: now, and the largest so far.
Argument: number of threads.
"""

import base64
import json
import math
import re
import resource
import struct
import sys
import time

import torch
import torch.nn.functional as F

PREFIX = "first_stage_model."
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
LATENT_SCALE, LATENT_SHIFT = 1.5305, 0.0609


def read_safetensors(path):
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        start = 8 + length
        tensors = {}
        for name, entry in header.items():
            if not name.startswith(PREFIX):
                continue
            begin, end = entry["data_offsets"]
            file.seek(start + begin)
            flat = torch.frombuffer(bytearray(file.read(end - begin)), dtype=DTYPES[entry["dtype"]])
            tensors[name[len(PREFIX) :]] = flat.reshape(entry["shape"]).float()
        return tensors


class Vae:
    """Weights by the checkpoint's names; sizes follow from their shapes."""

    def __init__(self, weights, groups):
        self.weights = weights
        self.groups = groups

    def count(self, pattern):
        return len({match[0] for match in map(re.compile(pattern).match, self.weights) if match})

    def convolution(self, name, x, **options):
        w = self.weights[name + ".weight"]
        return F.conv2d(x, w, self.weights[name + ".bias"], padding=options.pop("padding", w.shape[-1] // 2), **options)

    def norm(self, name, x):
        return F.group_norm(x, self.groups, self.weights[name + ".weight"], self.weights[name + ".bias"], 1e-6)

    def block(self, name, x):
        y = self.convolution(name + ".conv1", F.silu(self.norm(name + ".norm1", x)))
        y = self.convolution(name + ".conv2", F.silu(self.norm(name + ".norm2", y)))
        shortcut = name + ".nin_shortcut"
        return (self.convolution(shortcut, x) if shortcut + ".weight" in self.weights else x) + y

    def attention(self, name, x):
        normal = self.norm(name + ".norm", x)
        q, k, v = (self.convolution(f"{name}.{part}", normal).flatten(2).transpose(1, 2) for part in "qkv")
        mixed = F.scaled_dot_product_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)).squeeze(1)
        return x + self.convolution(name + ".proj_out", mixed.transpose(1, 2).reshape(x.shape))

    def middle(self, name, x):
        x = self.attention(name + ".attn_1", self.block(name + ".block_1", x))
        return self.block(name + ".block_2", x)

    def decode(self, latent):
        x = self.convolution("decoder.conv_in", latent / LATENT_SCALE + LATENT_SHIFT)
        x = self.middle("decoder.mid", x)
        for level in reversed(range(self.count(r"decoder\.up\.\d+"))):
            name = f"decoder.up.{level}"
            for index in range(self.count(re.escape(name) + r"\.block\.\d+")):
                x = self.block(f"{name}.block.{index}", x)
            if level > 0:
                x = self.convolution(name + ".upsample.conv", F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.convolution("decoder.conv_out", F.silu(self.norm("decoder.norm_out", x)))

    def encode(self, image):
        x = self.convolution("encoder.conv_in", image)
        levels = self.count(r"encoder\.down\.\d+")
        for level in range(levels):
            name = f"encoder.down.{level}"
            for index in range(self.count(re.escape(name) + r"\.block\.\d+")):
                x = self.block(f"{name}.block.{index}", x)
            if level < levels - 1:
                x = self.convolution(name + ".downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2, padding=0)
        x = self.middle("encoder.mid", x)
        return self.convolution("encoder.conv_out", F.silu(self.norm("encoder.norm_out", x)))


def memory():
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[1]) * resource.getpagesize()
    return {"now": now, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
