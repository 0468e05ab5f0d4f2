import { describe, expect, it } from 'vitest';
import { SD3_VAE } from '../../src/models/config.ts';
import { torchGenerator } from '../../src/sampling/noise.ts';
import { floats, leaves } from '../../src/tensor/index.ts';
import { gradientSource, type Parameters } from '../../src/training/gradients.ts';
import { initialValue } from '../../src/training/initial.ts';
import { autoencoderLoss, flowBatch, READOUTS, readoutTensors } from '../../src/training/loss.ts';
import { parameterName, wholePart } from '../../src/training/parts.ts';
import { vaeTensors } from '../../src/weights/expected.ts';
import { cpu, randomFloats } from '../support/run.ts';

const VAE = { ...SD3_VAE, channels: 8, multipliers: [1, 1, 2], resBlocks: 1, groups: 4, latentChannels: 4 };

function initialValues(): Parameters {
  const random = torchGenerator(1);
  return new Map(
    [...vaeTensors(VAE), ...readoutTensors(VAE)].map(([name, shape]) => [
      parameterName('vae', name),
      initialValue(name, shape, (count) => random.normal(count)),
    ]),
  );
}

describe("the autoencoder's loss", () => {
  const batch = { image: randomFloats([1, 3, 16, 16], 1), noise: randomFloats([1, 4, 4, 4], 2) };

  it('reads pictures off the latent and every level of the decoder but the last', () => {
    expect([...readoutTensors(VAE)]).toEqual([
      [`${READOUTS}latent.weight`, [48, 4, 3, 3]],
      [`${READOUTS}latent.bias`, [48]],
      [`${READOUTS}1.weight`, [12, 8, 1, 1]],
      [`${READOUTS}1.bias`, [12]],
      [`${READOUTS}2.weight`, [48, 16, 1, 1]],
      [`${READOUTS}2.bias`, [48]],
    ]);
  });

  it('has a readout that puts each pixel where it belongs', async () => {
    const values = initialValues();
    const { loss, pixels } = autoencoderLoss(VAE, wholePart('vae', values).weights, {
      edges: 0,
      colour: 0,
      divergence: 0,
      readouts: 1,
    });
    // Readouts that give the same at every place, rising from the first to the last pixel of a square.
    for (const [name, shape] of readoutTensors(VAE)) {
      const { data } = values.get(parameterName('vae', name))!;
      data.fill(0);
      if (name.endsWith('.bias')) for (let i = 0; i < data.length; i++) data[i] = i / shape[0]!;
    }
    const source = gradientSource(
      cpu,
      [{ outputs: { loss, pixels }, compile: wholePart('vae', values).compile }],
      () => true,
    );
    const zero = floats(
      batch.image.shape,
      batch.image.data.map(() => 0),
    );
    /** The picture that readouts of squares of a side give where nothing is in the features. */
    const read = (side: number) =>
      zero.data.map((_, i) => {
        const [channel, row, column] = [Math.floor(i / 256), Math.floor((i % 256) / 16), i % 16];
        return (channel * side ** 2 + (row % side) * side + (column % side)) / (3 * side ** 2);
      });
    const error = (expected: Float32Array, image: Float32Array) =>
      expected.reduce((sum, value, i) => sum + Math.abs(value - image[i]!), 0) / expected.length;
    for (const side of [2, 4]) {
      const image = floats(batch.image.shape, read(side));
      const { loss: whole, metrics } = await source.compute({ ...batch, image }, values);
      const others = [2, 4].map((other) => error(read(other), image.data));
      // Latent and level 2 have squares of 4, level 1 of 2.
      expect(whole - metrics.pixels!).toBeCloseTo((others[0]! + 2 * others[1]!) / 3, 4);
    }
    await source.dispose();
  });

  it('does without readouts', () => {
    const { loss } = autoencoderLoss(VAE, wholePart('vae', initialValues()).weights, { readouts: 0 });
    const names = leaves({ outputs: { loss } }).parameters.map(({ name }) => name!);
    expect(names.some((name) => name.includes(READOUTS))).toBe(false);
  });
});

describe('a batch of rectified flow', () => {
  it('lies on the straight path from each latent to its noise', () => {
    const latent = floats([2, 1, 1, 2], [1, 2, 3, 4]);
    const noise = floats([2, 1, 1, 2], [-1, 0, 1, 2]);
    const { latent: noisy, target, timestep } = flowBatch(latent, noise, [0.25, 1], { timestepWidth: 4 });
    expect([...noisy.data]).toEqual([0.5, 1.5, 1, 2]);
    expect([...target.data]).toEqual([-2, -2, -2, -2]);
    expect(timestep.shape).toEqual([2, 4]);
    expect(timestep.data[0]).toBeCloseTo(Math.cos(250), 4);
  });
});
