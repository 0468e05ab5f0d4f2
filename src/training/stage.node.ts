/**
 * A stage of training that can be stopped at any moment: its state (parameters, moments, average, random generator)
 * is saved every so often, and a stage started again goes on from the last state with the same batches.
 */

import { existsSync } from 'node:fs';
import { mkdir } from 'node:fs/promises';
import { dirname } from 'node:path';
import { type TorchGenerator, torchGenerator } from '../sampling/noise.ts';
import type { TensorData } from '../tensor/data.ts';
import { fileSource, writeSafetensorsFile } from '../weights/files.node.ts';
import { openSafetensors, readTensor } from '../weights/safetensors.ts';
import type { StepReport, Trainer } from './trainer.ts';

export interface StageOptions {
  trainer: Trainer;
  /** Where the state is saved. */
  stateFile: string;
  /** Steps in all, those of earlier runs included. */
  steps: number;
  /** The batch of a step; must depend on nothing but the generator and the step. */
  batch(random: TorchGenerator, step: number): Readonly<Record<string, TensorData>>;
  learningRate(step: number): number;
  /** Seed of a new run (default 0). */
  seed?: number;
  /** Steps between two saves (default 500). */
  saveEvery?: number;
  /** Called after every step. */
  onStep?(report: StepReport): void;
  /** Stops between two steps, after saving. */
  signal?: AbortSignal;
}

/** The random generator's state in the file's metadata. */
const RANDOM_KEY = 'random';

/** Runs a stage to its end, from its saved state if there is one. */
export async function runStage(options: StageOptions): Promise<void> {
  const { trainer, stateFile, steps, batch, learningRate, seed = 0, saveEvery = 500, onStep, signal } = options;
  await mkdir(dirname(stateFile), { recursive: true });
  const { step: done, random } = await restore(trainer, stateFile, seed);
  const save = () => writeSafetensorsFile(stateFile, trainer.state(), { [RANDOM_KEY]: JSON.stringify(random.state()) });
  for (let step = done; step < steps; step++) {
    if (signal?.aborted) {
      await save();
      signal.throwIfAborted();
    }
    const report = await trainer.step(batch(random, step), learningRate(step));
    onStep?.(report);
    if (report.step % saveEvery === 0 || report.step === steps) await save();
  }
}

async function restore(
  trainer: Trainer,
  stateFile: string,
  seed: number,
): Promise<{ step: number; random: TorchGenerator }> {
  if (!existsSync(stateFile)) return { step: 0, random: torchGenerator(seed) };
  const source = await fileSource(stateFile);
  try {
    const file = await openSafetensors(source);
    const state = new Map<string, TensorData>();
    for (const name of file.tensors.keys()) state.set(name, await readTensor(file, name));
    trainer.restore(state);
    return { step: Number(state.get('step')!.data[0]), random: torchGenerator(JSON.parse(file.metadata[RANDOM_KEY]!)) };
  } finally {
    await source.close();
  }
}

/**
 * A learning rate that rises linearly from 0 over the first steps and falls along a cosine to a tenth at the end.
 * @returns a function of the step
 */
export function warmupCosine(peak: number, warmup: number, steps: number): (step: number) => number {
  return (step) => {
    if (step < warmup) return (peak * (step + 1)) / warmup;
    const progress = Math.min((step - warmup) / Math.max(steps - warmup, 1), 1);
    return peak * (0.1 + 0.45 * (1 + Math.cos(Math.PI * progress)));
  };
}
