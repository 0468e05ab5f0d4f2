import { describe, expect, it } from 'vitest';
import { input, mean, multiply, parameter, square, subtract } from '../../src/tensor/index.ts';
import { globalNorm } from '../../src/training/adamw.ts';
import { type GradientSource, gradientSource, type Parameters } from '../../src/training/gradients.ts';
import { createTrainer, NotFiniteError } from '../../src/training/trainer.ts';
import { threadedUpdater } from '../../src/training/updates.node.ts';
import { plainUpdater, type Updater } from '../../src/training/updates.ts';
import { cpu, randomFloats } from '../support/run.ts';

const SIDE = 1024;
const names = ['a', 'b', 'c'];
const target = randomFloats([SIDE, SIDE], 9);

/** Three matrices, large enough for a thread, whose product of elements is to be a fourth. */
function problem(): { source: GradientSource; values: Parameters } {
  const [a, b, c] = names.map((name) => parameter(name, 'float32', [SIDE, SIDE]));
  const error = subtract(multiply(multiply(a!, b!), c!), input('target', 'float32', [SIDE, SIDE]));
  const source = gradientSource(
    cpu,
    [{ outputs: { loss: mean(square(error)) }, compile: { bind: () => 'input' } }],
    () => true,
  );
  return { source, values: new Map(names.map((name, i) => [name, randomFloats([SIDE, SIDE], i + 1)])) };
}

async function train(updater: Updater) {
  const { source, values } = problem();
  const trainer = createTrainer(source, { values, updater, averageDecay: 0.9, clip: 1e-4 });
  const norms: number[] = [];
  for (let step = 0; step < 3; step++) norms.push((await trainer.step({ target }, 1e-2)).norm);
  await source.dispose();
  return { norms, state: trainer.state() };
}

describe('AdamW in two threads', () => {
  it('gives what one thread gives', async () => {
    const plain = await train(plainUpdater);
    const threaded = await train(threadedUpdater());
    for (const [i, norm] of plain.norms.entries()) expect(threaded.norms[i]! / norm).toBeCloseTo(1, 12);
    for (const [name, { data }] of plain.state) {
      const other = threaded.state.get(name)!.data as Float32Array;
      expect(other.length).toBe(data.length);
      // The norm is summed in another order, which may change a last bit.
      let worst = 0;
      for (let i = 0; i < other.length; i++) worst = Math.max(worst, Math.abs(other[i]! - Number(data[i])));
      expect(worst, name).toBeLessThan(1e-6);
    }
  });

  it('is the same each time', async () => {
    const first = await train(threadedUpdater());
    const second = await train(threadedUpdater());
    expect(first.norms).toEqual(second.norms);
    for (const [name, { data }] of first.state)
      expect(Buffer.from(data.buffer).equals(Buffer.from(second.state.get(name)!.data.buffer)), name).toBe(true);
  });

  it('changes nothing when the loss is not a number', async () => {
    const { source, values } = problem();
    const trainer = createTrainer(source, { values, updater: threadedUpdater() });
    const before = globalNorm(names.map((name) => values.get(name)!.data));
    const broken = randomFloats([SIDE, SIDE], 3);
    broken.data[0] = Number.NaN;
    await expect(trainer.step({ target: broken }, 1e-2)).rejects.toThrow(NotFiniteError);
    expect(globalNorm(names.map((name) => values.get(name)!.data))).toBe(before);
    expect(trainer.steps).toBe(0);
    await trainer.step({ target }, 1e-2);
    await source.dispose();
  });
});
