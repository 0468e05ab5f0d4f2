import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { floats, input, mean, parameter, square, subtract } from '../../src/tensor/index.ts';
import { runStage, warmupCosine } from '../../src/training/stage.node.ts';
import { createTrainer } from '../../src/training/trainer.ts';
import { cpu } from '../support/run.ts';

let folder: string;
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'mmditx-stage-'));
});
afterEach(() => rm(folder, { recursive: true }));

/** A trainer that moves a vector towards random targets. */
async function newTrainer() {
  const vector = parameter('vector', 'float32', [4]);
  const loss = mean(square(subtract(vector, input('target', 'float32', [4]))));
  return createTrainer(cpu, { loss, values: new Map([['vector', floats([4], [1, 2, 3, 4])]]), averageDecay: 0.9 });
}

async function run(file: string, steps: number, stopAfter?: number) {
  const trainer = await newTrainer();
  const losses: number[] = [];
  const stop = new AbortController();
  const done = runStage({
    trainer,
    stateFile: join(folder, file),
    steps,
    saveEvery: 2,
    batch: (random) => ({ target: floats([4], random.uniform(4)) }),
    learningRate: () => 0.05,
    signal: stop.signal,
    onStep: ({ step, loss }) => {
      losses.push(loss);
      if (step === stopAfter) stop.abort(new Error('stopped'));
    },
  });
  if (stopAfter) await expect(done).rejects.toThrow('stopped');
  else await done;
  await trainer.dispose();
  return { losses, values: [...trainer.parameters.get('vector')!.data] };
}

describe('a stage of training', () => {
  it('gives the same losses and parameters when it is stopped and started again', async () => {
    const whole = await run('whole.safetensors', 9);
    const first = await run('parts.safetensors', 9, 5);
    const second = await run('parts.safetensors', 9);
    expect([...first.losses, ...second.losses]).toEqual(whole.losses);
    expect(second.values).toEqual(whole.values);
  });

  it('does nothing when it is already finished', async () => {
    await run('done.safetensors', 3);
    expect((await run('done.safetensors', 3)).losses).toEqual([]);
  });
});

describe('the learning rate', () => {
  it('warms up, peaks and falls to a tenth', () => {
    const rate = warmupCosine(1, 10, 100);
    expect(rate(0)).toBeCloseTo(0.1);
    expect(rate(10)).toBeCloseTo(1);
    expect(rate(100)).toBeCloseTo(0.1);
  });
});
