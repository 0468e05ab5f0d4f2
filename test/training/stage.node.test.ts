import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { floats, input, mean, parameter, square, subtract } from '../../src/tensor/index.ts';
import { stepRandom } from '../../src/training/batches.ts';
import { checkTrainConfig } from '../../src/training/config.ts';
import { gradientSource } from '../../src/training/gradients.ts';
import type { TrainEvent } from '../../src/training/log.ts';
import { restoreStage, runStage, type StageLoopOptions, type StageWork } from '../../src/training/stage.node.ts';
import { createTrainer } from '../../src/training/trainer.ts';
import { cpu } from '../support/run.ts';

let folder: string;
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'mmditx-stage-'));
});
afterEach(() => rm(folder, { recursive: true }));

/** A vector that is moved towards random targets. */
function newWork(broken?: number): StageWork & { trainer: ReturnType<typeof createTrainer> } {
  const vector = parameter('vector', 'float32', [4]);
  const loss = mean(square(subtract(vector, input('target', 'float32', [4]))));
  const source = gradientSource(cpu, [{ outputs: { loss }, compile: { bind: () => 'input' } }], () => true);
  const values = new Map([['vector', floats([4], [1, 2, 3, 4])]]);
  return {
    trainer: createTrainer(source, { values, averageDecay: 0.9 }),
    batchAt: async (index) => {
      const target = stepRandom(7, index).uniform(4);
      if (index === broken) target[0] = Number.NaN;
      return { batch: { target: floats([4], target) }, names: [`picture-${index}.png`], size: [8, 8], epoch: 0 };
    },
  };
}

function options(
  steps: number,
  emit: (event: TrainEvent) => void,
  more: Partial<StageLoopOptions> = {},
): StageLoopOptions {
  const config = checkTrainConfig(
    {
      name: 'vector',
      model: 'none',
      data: { none: { path: 'none', sizes: [8] } },
      checkpoints: { every: 2 },
      stages: [{ name: 'only', train: 'autoencoder', steps, accumulate: 2, learningRate: { peak: 0.05 } }],
    },
    'test',
  );
  const [stage] = config.stages;
  if (stage?.train !== 'autoencoder') throw new Error('another stage');
  return {
    config,
    stage,
    index: 0,
    checkpoints: folder,
    fingerprints: { exact: 'abc', resumable: 'ab' },
    emit,
    ...more,
  };
}

async function run(steps: number, { stopAfter, ...more }: Partial<StageLoopOptions> & { stopAfter?: number } = {}) {
  const work = newWork();
  const losses: number[] = [];
  const stop = new AbortController();
  const loop = options(
    steps,
    (event) => {
      if (event.type !== 'step') return;
      losses.push(event.loss);
      if (event.step === stopAfter) stop.abort(new Error('stopped'));
    },
    { signal: stop.signal, ...more },
  );
  const { file } = await restoreStage(work.trainer, loop, () => undefined);
  const done = runStage(work, loop, file);
  if (stopAfter) await expect(done).rejects.toThrow('stopped');
  else await done;
  return { losses, values: [...work.trainer.parameters.get('vector')!.data] };
}

describe('a stage of training', () => {
  it('gives the same losses and parameters when it is stopped and started again', async () => {
    const whole = await run(9, { checkpoints: join(folder, 'whole') });
    const first = await run(9, { stopAfter: 5 });
    const second = await run(9);
    expect([...first.losses, ...second.losses]).toEqual(whole.losses);
    expect(second.values).toEqual(whole.values);
  });

  it('does nothing when it is already finished', async () => {
    await run(3);
    expect((await run(3)).losses).toEqual([]);
  });

  it('refuses to go on from a state of another configuration', async () => {
    await run(3);
    const work = newWork();
    const loop = options(3, () => undefined, { fingerprints: { exact: 'other', resumable: 'other' } });
    await expect(restoreStage(work.trainer, loop, () => undefined)).rejects.toThrow(/have changed since .* was saved/);
  });

  it('goes on with another learning rate, and says so', async () => {
    const first = await run(9, { stopAfter: 5 });
    const work = newWork();
    const problems: string[] = [];
    const loop = options(9, () => undefined, { fingerprints: { exact: 'slower', resumable: 'ab' } });
    const { step } = await restoreStage(work.trainer, loop, (problem) => problems.push(problem));
    expect(step).toBe(first.losses.length);
    expect(problems).toEqual([expect.stringMatching(/optimiser have changed since step 5/)]);
  });

  it('names step, batch and last good state when a loss is not a number', async () => {
    const work = newWork(7);
    const loop = options(9, () => undefined);
    await expect(runStage(work, loop)).rejects.toThrow(
      /stopped at step 4: .*batch was picture-6\.png, picture-7\.png; the last good state is .*step-0*2-/,
    );
  });

  it('goes on where no state can be saved, and says so', async () => {
    const notes: string[] = [];
    const losses: number[] = [];
    const work = newWork();
    const loop = options(4, (event) => {
      if (event.type === 'note') notes.push(event.message);
      if (event.type === 'step') losses.push(event.loss);
    });
    // A file stands where the folder of states should be.
    const { writeFile } = await import('node:fs/promises');
    const blocked = join(folder, 'file');
    await writeFile(blocked, '');
    await runStage(work, { ...loop, checkpoints: blocked });
    expect(losses).toHaveLength(4);
    expect(notes[0]).toMatch(/Training goes on; the last saved state is none/);
  });
});
