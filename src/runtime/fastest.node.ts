/** Choosing a device: the one that runs a matrix product fastest, of those that pass the runtime's trial. */

import { existsSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';
import { floats, input, matmul, type Program } from '../tensor/index.ts';
import { availableDevices, type NodeRuntimeOptions, nodeRuntime } from './node.node.ts';
import type { Device, Runtime } from './runtime.ts';

/** Side and number of the trial's matrices: 4 GFLOP, some tens of milliseconds on two cores. */
const TRIAL_SIZE = 768;
const TRIAL_PRODUCTS = 4;
const TRIAL_RUNS = 3;
/** Another device than the first must be this much faster, so that the choice does not waver from run to run. */
const CLEARLY_FASTER = 1.5;

/**
 * Devices that are tried besides the CPU: those whose hardware or libraries are there to be seen, because a failed try
 * writes native messages to the terminal. DirectML and CoreML are for those who ask.
 */
function candidates(): Device[] {
  const available = availableDevices();
  const cuda = process.platform === 'linux' && existsSync('/dev/nvidia0') && hasCudaLibraries();
  return [
    ...(cuda && available.includes('cuda') ? (['cuda'] as const) : []),
    ...(hasGraphicsHardware() && available.includes('webgpu') ? (['webgpu'] as const) : []),
  ];
}

/** Whether onnxruntime-node was installed with its CUDA libraries, a download of their own. */
function hasCudaLibraries(): boolean {
  const entry = createRequire(import.meta.url).resolve('onnxruntime-node');
  const folder = join(dirname(entry), '../bin/napi-v6', process.platform, process.arch);
  return existsSync(join(folder, 'libonnxruntime_providers_cuda.so'));
}

/** On Linux a graphics card shows as a device file; other desktop systems always have one. */
function hasGraphicsHardware(): boolean {
  if (process.platform !== 'linux') return true;
  return ['/dev/dri/renderD128', '/dev/nvidia0', '/dev/dxg'].some((path) => existsSync(path));
}

/**
 * The fastest device of this machine that works. An imitation of a graphics device in software loses against the CPU
 * it runs on.
 */
export async function fastestRuntime(options: Omit<NodeRuntimeOptions, 'device'> = {}): Promise<Runtime> {
  return fastestOf(['cpu' as const, ...candidates()].map((device) => nodeRuntime({ ...options, device })));
}

/** The runtime that is fastest in a trial, of those that do not fail it; a single one is not tried. */
export async function fastestOf(runtimes: readonly Runtime[]): Promise<Runtime> {
  const [first, ...others] = runtimes as [Runtime, ...Runtime[]];
  if (others.length === 0) return first;
  let best = { runtime: first, seconds: await trialSeconds(first) };
  for (const runtime of others) {
    // A device that fails is not on this machine.
    const seconds = await trialSeconds(runtime).catch(() => Number.POSITIVE_INFINITY);
    if (seconds * CLEARLY_FASTER < best.seconds) best = { runtime, seconds };
  }
  return best.runtime;
}

/** Seconds of a few matrix products on a device once it is warm. */
async function trialSeconds(runtime: Runtime): Promise<number> {
  const shape = [TRIAL_SIZE, TRIAL_SIZE];
  const b = input('b', 'float32', shape);
  let product = input('a', 'float32', shape);
  for (let i = 0; i < TRIAL_PRODUCTS; i++) product = matmul(product, b);
  const program: Program = { outputs: { product } };
  const executable = await runtime.compile(program, { bind: () => 'input' });
  const values = floats(shape, new Float32Array(TRIAL_SIZE ** 2).fill(1 / TRIAL_SIZE));
  const inputs = { a: values, b: values };
  await executable.run(inputs);
  let seconds = Number.POSITIVE_INFINITY;
  for (let run = 0; run < TRIAL_RUNS; run++) {
    const start = performance.now();
    await executable.run(inputs);
    seconds = Math.min(seconds, (performance.now() - start) / 1000);
  }
  await executable.dispose();
  return seconds;
}
