import { existsSync } from 'node:fs';
import { mkdtemp, readdir, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { availableDevices, nodeRuntime } from '../../src/runtime/node.node.ts';
import type { Device, Executable } from '../../src/runtime/runtime.ts';
import * as t from '../../src/tensor/index.ts';
import { boundWeights, runSmall } from '../support/programs.ts';
import { cpu, maxDifference, randomFloats } from '../support/run.ts';

let folder: string;
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'mmditx-runtime-'));
});
afterAll(() => rm(folder, { recursive: true }));

const [batch, width] = [t.symbol('batch'), t.symbol('width')];
/** latent [batch, 4, 2 width] times scale [batch, 1, 1]. */
function scaled(): Promise<Executable> {
  const latent = t.input('latent', 'float32', [batch, 4, t.times(2, width)]);
  const scale = t.input('scale', 'float32', [batch, 1, 1]);
  return cpu.compile({ outputs: { y: t.multiply(latent, scale) } }, { bind: () => 'input' });
}

describe('inputs', () => {
  let program: Executable;
  const scale = t.floats([2, 1, 1], [1, 2]);
  beforeAll(async () => {
    program = await scaled();
  });
  afterAll(() => program.dispose());

  it('of any size that fits are taken', async () => {
    for (const columns of [2, 6]) {
      const { y } = await program.run({ latent: randomFloats([2, 4, columns]), scale });
      expect(y!.shape).toEqual([2, 4, columns]);
    }
  });

  it.each([
    [
      'another rank',
      randomFloats([2, 4]),
      /^Input "latent" is float32 \[2, 4\]; the program takes float32 \[batch, 4, 2\*width\]/,
    ],
    ['another size', randomFloats([2, 3, 8]), /^Input "latent" is float32 \[2, 3, 8\]; the program takes/],
    ['half a symbol', randomFloats([2, 4, 5]), /^Input "latent" is float32 \[2, 4, 5\]; the program takes/],
    [
      'another type',
      { dtype: 'int32', shape: [2, 4, 2], data: new Int32Array(16) } as const,
      /^Input "latent" is int32 \[2, 4, 2\]/,
    ],
    [
      'another batch than the input before',
      randomFloats([3, 4, 2]),
      /^Input "scale" is float32 \[2, 1, 1\]; .*, where batch is 3\.$/,
    ],
  ])('of %s are named', async (_name, latent, message) => {
    await expect(program.run({ latent, scale })).rejects.toThrow(message);
    await expect(program.run({ latent, scale })).rejects.toMatchObject({ code: 'bad-option' });
  });

  it('that are missing are named', async () => {
    await expect(program.run({ latent: randomFloats([2, 4, 2]) })).rejects.toThrow(/a value for its input "scale"/);
  });
});

describe('an executable', () => {
  const values = { latent: randomFloats([1, 4, 2]), scale: t.floats([1, 1, 1], [3]) };

  it('gives the reason of an aborted signal and stays usable', async () => {
    const program = await scaled();
    const reason = new Error('the user went away');
    await expect(program.run(values, { signal: AbortSignal.abort(reason) })).rejects.toBe(reason);
    const { y } = await program.run(values, { signal: new AbortController().signal });
    expect(y!.data[0]).toBe(Math.fround(3 * values.latent.data[0]!));
    await program.dispose();
  });

  it('runs several times at once', async () => {
    const program = await scaled();
    const results = await Promise.all(
      [1, 2, 3].map((by) => program.run({ ...values, scale: t.floats([1, 1, 1], [by]) })),
    );
    expect(results.map(({ y }) => y!.data[5])).toEqual([1, 2, 3].map((by) => Math.fround(by * values.latent.data[5]!)));
    await program.dispose();
  });

  it('ends what it has begun before it is disposed of, and does not run afterwards', async () => {
    const program = await scaled();
    const last = program.run(values);
    await program.dispose();
    expect((await last).y!.shape).toEqual([1, 4, 2]);
    await expect(program.run(values)).rejects.toThrow(/has been disposed of/);
    await expect(program.dispose()).resolves.toBeUndefined();
  });

  it('writes a profile when asked to', async () => {
    const x = t.input('x', 'float32', [2]);
    const program = await cpu.compile(
      { outputs: { y: t.exponential(x) } },
      { bind: () => 'input', profile: join(folder, 'profile') },
    );
    await program.run({ x: t.floats([2], [0, 1]) });
    await program.dispose();
    expect((await readdir(folder)).filter((name) => /^profile.*\.json$/.test(name))).toHaveLength(1);
  });
});

describe('weights', () => {
  it('in memory and on disk are the same', async () => {
    const inMemory = boundWeights();
    const path = join(folder, 'weights.safetensors');
    await writeFile(path, inMemory.file);
    const onDisk = { ...inMemory, options: { ...inMemory.options, files: [{ name: 'weights.safetensors', path }] } };
    const [a, b] = [await runSmall(cpu, inMemory), await runSmall(cpu, onDisk)];
    expect(a.result!.shape).toEqual([2, 3, 5]);
    expect(maxDifference(a.result!, b.result!)).toBe(0);
  });

  it('are given back when an executable is disposed of', async () => {
    // Beyond 32 MiB glibc maps memory for each allocation and gives it back at once, so what stays is held by someone.
    const side = 4096;
    const byteLength = 4 * side ** 2;
    const path = join(folder, 'large.bin');
    await writeFile(path, new Uint8Array(byteLength));
    const program = {
      outputs: { y: t.linear(t.input('x', 'float32', [1, side]), t.parameter('w', 'float32', [side, side])) },
    };
    const once = async () => {
      const executable = await cpu.compile(program, {
        bind: () => ({ file: 'large.bin', offset: 0, byteLength }),
        files: [{ name: 'large.bin', path }],
      });
      await executable.run({ x: t.floats([1, side], new Float32Array(side)) });
      await executable.dispose();
    };
    for (let i = 0; i < 2; i++) await once();
    const before = process.memoryUsage.rss();
    const times = 8;
    for (let i = 0; i < times; i++) await once();
    expect((process.memoryUsage.rss() - before) / byteLength).toBeLessThan(times / 4);
  });
});

describe('a device', () => {
  const absent: Partial<Record<Device, boolean>> = {
    cuda: !existsSync('/proc/driver/nvidia'),
    dml: process.platform !== 'win32',
    coreml: process.platform !== 'darwin',
  };
  for (const [device, isAbsent] of Object.entries(absent) as [Device, boolean][]) {
    it.skipIf(!isAbsent)(`${device} that is not there is an error that says what it needs`, async () => {
      const check = async () => nodeRuntime({ device }).check();
      await expect(check()).rejects.toMatchObject({ code: 'device-unavailable' });
      await expect(check()).rejects.toThrow(
        new RegExp(`^Device "${device}" cannot be used here\\. It needs .* choose device `),
      );
    });
  }

  it.skipIf(process.platform !== 'linux')('webgpu without a graphics driver says what it needs', async () => {
    process.env.VK_DRIVER_FILES = join(folder, 'no-driver.json');
    const runtime = nodeRuntime({ device: 'webgpu' });
    const message = /^Device "webgpu" cannot be used here\. It needs a graphics driver .* choose device "cpu"/;
    await expect(runtime.check()).rejects.toThrow(message);
    const x = t.input('x', 'float32', [1]);
    await expect(runtime.compile({ outputs: { x } }, { bind: () => 'input' })).rejects.toThrow(message);
  });

  it('that no runtime knows is an error that lists those it knows', () => {
    expect(() => nodeRuntime({ device: 'quantum' as Device })).toThrow(/no device "quantum".* cpu, webgpu, cuda/);
  });

  it.each([0, -1, 1.5, Number.NaN])('with %s threads is an error', (threads) => {
    expect(() => nodeRuntime({ threads })).toThrow(/number of threads is .*; it must be a whole number from 1/);
  });

  it('of this processor is always there, and the default', async () => {
    expect(availableDevices()).toContain('cpu');
    expect(nodeRuntime().device).toBe('cpu');
    await nodeRuntime().check();
  });
});
