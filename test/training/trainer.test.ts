import { describe, expect, it } from 'vitest';
import { centreCorner } from '../../src/models/mmditx.ts';
import { elementCount, type FloatTensor, floats, gradients, leaves, toFloat32 } from '../../src/tensor/index.ts';
import { adamwStep, globalNorm, zeroMoments } from '../../src/training/adamw.ts';
import { timestepInput, velocityLoss } from '../../src/training/loss.ts';
import { createTrainer, type Parameters, parameterInputs, trainableWeights } from '../../src/training/trainer.ts';
import { readWeight } from '../../src/weights/stored.ts';
import { golden, readGolden } from '../support/golden.ts';
import { goldenCheckpoint } from '../support/models.ts';
import { cpu } from '../support/run.ts';

const { config, tensors: stored } = (await goldenCheckpoint('train_model')).parts.transformer!;
const tensors = readGolden('train');
const get = (name: string) => golden(tensors, name) as FloatTensor;

async function initialParameters(): Promise<Parameters> {
  const values: Parameters = new Map();
  for (const [name, tensor] of stored)
    values.set(name, floats(tensor.shape, toFloat32(await readWeight(tensor)).slice()));
  return values;
}

/** The golden batch of one of the three steps. */
function batchOf(step: number) {
  const latent = get('in.x0');
  const [items, , height, width] = latent.shape as [number, number, number, number];
  const sigma = get('in.sigma').data.slice(step * items, (step + 1) * items);
  const size = elementCount(latent.shape);
  return {
    latent,
    noise: floats(latent.shape, get('in.noise').data.slice(step * size, (step + 1) * size)),
    sigma: floats([items], sigma),
    timestep: timestepInput(sigma, config),
    context: get('in.context'),
    pooled: get('in.pooled'),
    corner: centreCorner(config.tableSize, height / config.patchSize, width / config.patchSize),
  };
}

describe('training agrees with the reference implementation', () => {
  it('in the loss, all gradients and their norm', async () => {
    const { weights } = trainableWeights();
    const loss = velocityLoss(config, weights);
    const parameters = leaves({ outputs: { loss } }).parameters.filter(({ name }) => name !== 'pos_embed');
    const names = parameters.map(({ name }) => name!);
    const outputs = Object.fromEntries(gradients(loss, parameters).map((gradient, i) => [names[i]!, gradient]));
    const executable = await cpu.compile({ outputs: { loss, ...outputs } }, { bind: () => 'input' });
    const values = await initialParameters();
    const results = await executable.run({
      ...batchOf(0),
      ...parameterInputs(leaves({ outputs: { loss } }).parameters, values),
    });
    const expected = Number(get('step0.loss').data[0]);
    expect(Math.abs(Number(results.loss!.data[0]) / expected - 1)).toBeLessThan(1e-5);

    const goldenNames = [...tensors.keys()].filter((name) => name.startsWith('step0.grad.'));
    expect(names.map((name) => `step0.grad.${name}`).sort()).toEqual(goldenNames.sort());
    expect(names).toHaveLength(88);
    for (const name of names) {
      const reference = get(`step0.grad.${name}`).data;
      const largest = reference.reduce((max, value) => Math.max(max, Math.abs(value)), 0);
      const gradient = results[name]!.data as Float32Array;
      expect(gradient.length).toBe(reference.length);
      const worst = gradient.reduce((max, value, i) => Math.max(max, Math.abs(value - reference[i]!)), 0);
      expect(worst, name).toBeLessThan(1e-4 * largest + 1e-7);
    }
    const norm = globalNorm(names.map((name) => results[name]!.data as Float32Array));
    expect(Math.abs(norm / Number(get('step0.grad_norm').data[0]) - 1)).toBeLessThan(1e-4);
    await executable.dispose();
  });

  it('after three steps of AdamW', async () => {
    const values = await initialParameters();
    const trainer = await createTrainer(cpu, {
      loss: velocityLoss(config, trainableWeights().weights),
      values,
      frozen: (name) => name === 'pos_embed',
      clip: Number.POSITIVE_INFINITY,
    });
    for (let step = 0; step < 3; step++) {
      const { loss } = await trainer.step(batchOf(step), 1e-3);
      expect(Math.abs(loss / Number(get('adamw.losses').data[step]) - 1)).toBeLessThan(2e-5);
    }
    for (const name of [...values.keys()].filter((key) => key !== 'pos_embed')) {
      const gradient = get(`step0.grad.${name}`).data;
      const reference = get(`adamw.param3.${name}`).data;
      const trained = values.get(name)!.data;
      // Where the gradient is nearly zero Adam's step has a random sign (see the tolerance of the golden tensors).
      const worst = trained.reduce(
        (max, value, i) => (Math.abs(gradient[i]!) > 1e-6 ? Math.max(max, Math.abs(value - reference[i]!)) : max),
        0,
      );
      expect(worst, name).toBeLessThan(2e-5);
    }
    await trainer.dispose();
  });

  it('goes on from its saved state as if never stopped', async () => {
    const create = async () =>
      createTrainer(cpu, {
        loss: velocityLoss(config, trainableWeights().weights),
        values: await initialParameters(),
        frozen: (name) => name === 'pos_embed',
        averageDecay: 0.9,
      });
    const straight = await create();
    for (let step = 0; step < 3; step++) await straight.step(batchOf(step), 1e-3);
    const stopped = await create();
    await stopped.step(batchOf(0), 1e-3);
    const resumed = await create();
    resumed.restore(stopped.state());
    for (let step = 1; step < 3; step++) await resumed.step(batchOf(step), 1e-3);
    expect([...resumed.state()]).toEqual([...straight.state()]);
    await Promise.all([straight, stopped, resumed].map((trainer) => trainer.dispose()));
  });
});

describe('AdamW', () => {
  it('decays weights apart from the gradient', () => {
    const parameter = Float32Array.of(1);
    adamwStep(parameter, Float32Array.of(0), zeroMoments(1), 1, 0.1, { weightDecay: 0.5 });
    expect(parameter[0]).toBeCloseTo(0.95, 6);
  });
});
