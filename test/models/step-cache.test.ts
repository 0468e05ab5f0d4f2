/** The step cache by itself, with hand-made tokens, and inside the transformer. */

import { existsSync } from 'node:fs';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { imageFromTensor } from '../../src/image/image.ts';
import { SMALL_MODEL } from '../../src/index.node.ts';
import { loadAutoencoder } from '../../src/models/autoencoder.ts';
import { bindWeights } from '../../src/models/bind.ts';
import { centreCorner, mmditxSegment, timestepEmbedding } from '../../src/models/mmditx.ts';
import { createStepCache, type StepCache, type StepCacheOptions } from '../../src/models/step-cache.ts';
import { loadTransformer, type Transformer, type TransformerPass } from '../../src/models/transformer.ts';
import type { Runtime } from '../../src/runtime/runtime.ts';
import { guidedDenoiser } from '../../src/sampling/guidance.ts';
import { torchGenerator } from '../../src/sampling/noise.ts';
import { type SamplerName, samplers } from '../../src/sampling/samplers.ts';
import { scheduleSigmas, timestep } from '../../src/sampling/schedules.ts';
import { elementCount, type FloatTensor, floats, type TensorData } from '../../src/tensor/index.ts';
import { openCheckpoint } from '../../src/weights/checkpoint.ts';
import { fileSource } from '../../src/weights/files.node.ts';
import { golden, readGolden } from '../support/golden.ts';
import { goldenCheckpoint } from '../support/models.ts';
import { cpu, maxDifference, randomFloats } from '../support/run.ts';

describe('the step cache', () => {
  const text = (): TransformerPass => ({ context: floats([1, 1, 1], [0]), pooled: floats([1, 1], [0]) });
  const pass = text();
  const tokens = (values: readonly number[], batch = 1) => floats([batch, 1, values.length / batch, 1], values);

  /**
   * One evaluation of passes whose tokens are zero before the first block and given after it.
   * @returns the tokens after the last block, and whether it was computed
   */
  async function evaluate(
    cache: StepCache,
    after: readonly FloatTensor[],
    last: readonly FloatTensor[] = after,
    { passes = [pass], timesteps = [500] }: { passes?: readonly TransformerPass[]; timesteps?: number[] } = {},
  ) {
    let computed = false;
    const blocks = after.map((tensor, i) => ({
      pass: passes[i]!,
      before: floats(tensor.shape, new Float32Array(tensor.data.length)),
      after: tensor,
    }));
    const result = await cache.afterLastBlock(blocks, timesteps, async () => {
      computed = true;
      return last;
    });
    return { computed, values: result.map(({ data }) => [...data]) };
  }
  /** Which of several evaluations in a row were computed: `#`, or `.` where one was reused. */
  async function course(cache: StepCache, after: readonly (readonly number[])[], timesteps?: readonly number[]) {
    let marks = '';
    for (const [i, values] of after.entries()) {
      const options = { timesteps: [timesteps?.[i] ?? 500] };
      marks += (await evaluate(cache, [tokens(values)], undefined, options)).computed ? '#' : '.';
    }
    return marks;
  }

  it.each<[string, StepCacheOptions]>([
    ['a negative threshold', { threshold: -0.1 }],
    ['a threshold above 1', { threshold: 1.01 }],
    ['a threshold that is no number', { threshold: Number.NaN }],
    ['no step in a row', { threshold: 0.1, maxConsecutive: 0 }],
    ['half a step in a row', { threshold: 0.1, maxConsecutive: 1.5 }],
    ['a negative last timestep', { threshold: 0.1, lastTimestep: -1 }],
    ['a last timestep without end', { threshold: 0.1, lastTimestep: Number.POSITIVE_INFINITY }],
  ])('refuses %s', (_name, options) => {
    expect(() => createStepCache(options)).toThrow(expect.objectContaining({ code: 'bad-option' }));
  });

  it('adds what the other blocks added last time', async () => {
    const cache = createStepCache({ threshold: 0.3 });
    await evaluate(cache, [tokens([1, 2])], [tokens([10, 20])]);
    const { computed, values } = await evaluate(cache, [tokens([1.5, 2.25])]);
    expect(computed).toBe(false);
    expect(values).toEqual([[1.5 + 9, 2.25 + 18]]);
    expect(cache).toMatchObject({ computed: 1, reused: 1 });
  });

  it('compares mean |difference| / mean |value| of what the first block added; equal to the threshold is too much', async () => {
    // |3 - 2| + |-2 - -2| = 1 of 4
    expect(
      await course(createStepCache({ threshold: 0.25 }), [
        [2, -2],
        [3, -2],
      ]),
    ).toBe('##');
    expect(
      await course(createStepCache({ threshold: 0.26 }), [
        [2, -2],
        [3, -2],
      ]),
    ).toBe('#.');
  });

  it('compares with the last evaluation that was computed, so that small changes add up', async () => {
    const cache = createStepCache({ threshold: 0.1 });
    expect(await course(cache, [[100], [106], [112], [118], [124]])).toBe('#.#.#');
  });

  it('computes everything at a threshold of 0, even where nothing changes', async () => {
    expect(await course(createStepCache({ threshold: 0 }), [[1], [1], [1]])).toBe('###');
  });

  it('reuses three evaluations in a row at most, or as many as it is told', async () => {
    const same = Array.from({ length: 8 }, () => [1]);
    expect(await course(createStepCache({ threshold: 1 }), same)).toBe('#...#...');
    expect(await course(createStepCache({ threshold: 1, maxConsecutive: 1 }), same)).toBe('#.#.#.#.');
  });

  it('computes the evaluations from the last timestep on', async () => {
    // As float32, which is how the model is given it.
    const last = 1000 * 0.1234567;
    const cache = createStepCache({ threshold: 1, lastTimestep: last });
    expect(await course(cache, [[1], [1], [1], [1]], [900, 500, Math.fround(last), 10])).toBe('#.##');
  });

  it('computes all passes when one of them has changed', async () => {
    const cache = createStepCache({ threshold: 0.1 });
    const passes = [pass, text()];
    await evaluate(cache, [tokens([1]), tokens([1])], undefined, { passes });
    expect((await evaluate(cache, [tokens([1]), tokens([1.2])], undefined, { passes })).computed).toBe(true);
    expect((await evaluate(cache, [tokens([1]), tokens([1.2])], undefined, { passes })).computed).toBe(false);
  });

  it('computes all items of a batch when one of them has changed', async () => {
    const cache = createStepCache({ threshold: 0.1 });
    await evaluate(cache, [tokens([100, 1], 2)]);
    expect((await evaluate(cache, [tokens([100, 1.2], 2)])).computed).toBe(true);
  });

  it('computes when a pass joins or skips other layers, and goes on when one leaves', async () => {
    const cache = createStepCache({ threshold: 0.1 });
    const skipping = { ...pass, skipLayers: [2] };
    const two = [tokens([1]), tokens([1])];
    const computed = async (passes: readonly TransformerPass[]) =>
      (await evaluate(cache, two.slice(0, passes.length), undefined, { passes })).computed;
    expect(await computed([pass])).toBe(true);
    expect(await computed([pass, skipping])).toBe(true);
    expect(await computed([pass, { ...pass, skipLayers: [2] }])).toBe(false);
    expect(await computed([pass, { ...pass, skipLayers: [3] }])).toBe(true);
    expect(await computed([pass])).toBe(false);
    expect(await computed([text()])).toBe(true);
  });

  it('computes when the size changes', async () => {
    const cache = createStepCache({ threshold: 1 });
    await evaluate(cache, [tokens([1, 1])]);
    expect((await evaluate(cache, [tokens([1, 1], 2)])).computed).toBe(true);
  });

  it('goes by the other passes where one skips the first block, and computes where none is left', async () => {
    const cache = createStepCache({ threshold: 0.1 });
    const passes = [pass, { ...pass, skipLayers: [0] }];
    await evaluate(cache, [tokens([1]), tokens([0])], undefined, { passes });
    expect((await evaluate(cache, [tokens([1]), tokens([0])], undefined, { passes })).computed).toBe(false);
    const alone = { passes: passes.slice(1) };
    expect((await evaluate(cache, [tokens([0])], undefined, alone)).computed).toBe(true);
  });

  it('reuses nothing where numbers are not finite', async () => {
    const cache = createStepCache({ threshold: 1 });
    expect(
      await course(cache, [
        [Number.NaN, 1],
        [Number.NaN, 1],
        [1, 1],
        [Number.POSITIVE_INFINITY, 1],
      ]),
    ).toBe('####');
  });

  it('does not remember an evaluation that failed', async () => {
    const cache = createStepCache({ threshold: 0.1 });
    await evaluate(cache, [tokens([1])], [tokens([10])]);
    const block = { pass, before: tokens([0]), after: tokens([2]) };
    await expect(cache.afterLastBlock([block], [500], () => Promise.reject(new Error('no')))).rejects.toThrow('no');
    expect(cache).toMatchObject({ computed: 1, reused: 0 });
    expect((await evaluate(cache, [tokens([1])])).values).toEqual([[10]]);
  });
});

describe('the transformer with a step cache', async () => {
  const { parts } = await goldenCheckpoint();
  const part = parts.transformer!;
  const tensors = readGolden('mmdit');
  const get = (name: string) => golden(tensors, name) as FloatTensor;
  const [latent, context, pooled] = [get('B.in.latent'), get('B.in.context'), get('B.in.pooled')];
  const timesteps = get('B.in.timestep').data;
  const positive = { context, pooled };
  const negative = { context: randomFloats(context.shape, 1), pooled: randomFloats(pooled.shape, 2) };
  /** Layers whose omission has golden outputs, the first one among them. */
  const skipping = [[1, 2], [0], [2]].map((skipLayers) => ({ ...positive, skipLayers }));
  const moved = floats(
    latent.shape,
    latent.data.map((value, i) => value + 0.1 * Math.sin(i)),
  );
  const tolerance = 6e-6;

  let transformer: Transformer;
  beforeAll(() => {
    transformer = loadTransformer(cpu, part);
  });
  afterAll(() => transformer.dispose());

  it('gives the same to the last bit at a threshold of 0', async () => {
    const uncut = loadTransformer(cpu, part);
    const cache = createStepCache({ threshold: 0 });
    for (const input of [latent, latent, moved]) {
      const whole = await uncut.velocities(input, timesteps, [positive, negative]);
      const cached = await transformer.velocities(input, timesteps, [positive, negative], { cache });
      expect(cached).toEqual(whole);
    }
    expect(cache).toMatchObject({ computed: 3, reused: 0 });
    await uncut.dispose();
  });

  it.each([
    ['A', 'a batch of two'],
    ['B', 'one picture'],
  ])('case %s: a reused step on the same latent agrees with the reference (%s)', async (name) => {
    const cache = createStepCache({ threshold: 0.01 });
    const base = { context: get(`${name}.in.context`), pooled: get(`${name}.in.pooled`) };
    const passes = [base, ...skipping.map(({ skipLayers }) => ({ ...base, skipLayers }))];
    const outputs = ['out', 'out.skip1_2', 'out.skip0', 'out.skip2'];
    for (let evaluation = 0; evaluation < 2; evaluation++) {
      const input = get(`${name}.in.latent`);
      const velocities = await transformer.velocities(input, get(`${name}.in.timestep`).data, passes, { cache });
      for (const [i, output] of outputs.entries()) {
        expect(maxDifference(velocities[i]!, get(`${name}.${output}`)), output).toBeLessThan(tolerance);
      }
    }
    expect(cache).toMatchObject({ computed: 1, reused: 1 });
  });

  it('a reused step on another latent is the first block, the old change of the others and the output', async () => {
    const { config } = part;
    const bound = bindWeights(part);
    const [rows, columns] = [latent.shape[2]! / config.patchSize, latent.shape[3]! / config.patchSize];
    const corner = centreCorner(config.tableSize, rows, columns);
    const through = async (start: number, end: number, flow: Record<string, TensorData>) => {
      const program = await cpu.compile(mmditxSegment(config, bound.weights, start, end), bound);
      const result = await program.run({ ...flow, corner });
      await program.dispose();
      return result;
    };
    const inputs = (at: FloatTensor, time: ArrayLike<number>) => ({
      latent: at,
      timestep: timestepEmbedding(time, config.timestepWidth),
      context,
      pooled,
    });
    const later = [timesteps[0]! - 20];
    const after = await through(0, 2, inputs(moved, later));
    const [first, last] = [get('B.mid.block0.x').data, get('B.mid.block3.x').data];
    const image = floats(
      after.image!.shape,
      Float32Array.from(after.image!.data as Float32Array, (value, i) => value + last[i]! - first[i]!),
    );
    const { velocity } = await through(config.depth + 1, config.depth + 2, { ...after, image });

    const cache = createStepCache({ threshold: 1 });
    await transformer.velocities(latent, timesteps, [positive], { cache });
    const [reused] = await transformer.velocities(moved, later, [positive], { cache });
    expect(cache).toMatchObject({ computed: 1, reused: 1 });
    expect(maxDifference(reused!, velocity!)).toBeLessThan(tolerance);
    const [full] = await transformer.velocities(moved, later, [positive]);
    expect(maxDifference(reused!, full!)).toBeGreaterThan(100 * tolerance);
  });

  it('stops in the middle of an evaluation, which does not count', async () => {
    const controller = new AbortController();
    let runs = 0;
    const stopping = loadTransformer(
      withExecutable((executable) => ({
        ...executable,
        run(values, options) {
          // The third segment of the second evaluation: after the embedding and the first block.
          if (++runs === 6) controller.abort(new Error('enough'));
          return executable.run(values, options);
        },
      })),
      part,
    );
    const cache = createStepCache({ threshold: 0 });
    const options = { cache, signal: controller.signal };
    const expected = await stopping.velocities(latent, timesteps, [positive], options);
    expect(runs).toBe(4);
    await expect(stopping.velocities(moved, timesteps, [positive], options)).rejects.toThrow('enough');
    expect(cache).toMatchObject({ computed: 1, reused: 0 });
    expect(await stopping.velocities(latent, timesteps, [positive], { cache })).toEqual(expected);
    await stopping.dispose();
  });

  it('compiles what a new cut falls into again, and nothing else', async () => {
    let compiled = 0;
    const counting = loadTransformer(
      withExecutable((executable) => {
        compiled++;
        return executable;
      }),
      part,
    );
    const evaluate = async (passes: readonly TransformerPass[], cache?: StepCache) => {
      compiled = 0;
      await counting.velocities(latent, timesteps, passes, { cache });
      return compiled;
    };
    const cache = createStepCache({ threshold: 0 });
    const guided = [positive, { ...positive, skipLayers: [2] }];
    // Embedding; first block; the other three; output.
    expect(await evaluate([positive], cache)).toBe(4);
    // The other three, apart.
    expect(await evaluate(guided, cache)).toBe(3);
    for (let step = 0; step < 2; step++) {
      expect(await evaluate([positive], cache)).toBe(0);
      expect(await evaluate(guided)).toBe(0);
      expect(await evaluate(guided, cache)).toBe(0);
    }
    await counting.dispose();
  });

  it('leaves out different layers in different passes', async () => {
    const fresh = loadTransformer(cpu, part);
    const [both, first, single] = await fresh.velocities(latent, timesteps, skipping);
    expect(maxDifference(both!, get('B.out.skip1_2'))).toBeLessThan(tolerance);
    expect(maxDifference(first!, get('B.out.skip0'))).toBeLessThan(tolerance);
    expect(maxDifference(single!, get('B.out.skip2'))).toBeLessThan(tolerance);
    await fresh.dispose();
  });
});

/** The CPU, with a hand on what is compiled. */
function withExecutable(change: (executable: Awaited<ReturnType<Runtime['compile']>>) => typeof executable): Runtime {
  return { ...cpu, compile: async (program, options) => change(await cpu.compile(program, options)) };
}

describe.skipIf(!existsSync(SMALL_MODEL))('pictures of the small model with a step cache', async () => {
  const source = await fileSource(SMALL_MODEL);
  const { parts } = await openCheckpoint([source]);
  const transformer = loadTransformer(cpu, parts.transformer!);
  const vae = loadAutoencoder(cpu, parts.vae!);
  const { config } = transformer;
  afterAll(async () => {
    await Promise.all([transformer.dispose(), vae.dispose()]);
    await source.close();
  });

  /** It was trained on texts of zeros among others; the other one only has to differ. */
  const negative = {
    context: floats([1, 32, config.contextWidth], new Float32Array(32 * config.contextWidth)),
    pooled: floats([1, config.pooledWidth], new Float32Array(config.pooledWidth)),
  };
  const positive = { context: randomFloats(negative.context.shape, 3), pooled: randomFloats(negative.pooled.shape, 4) };
  const [steps, cfg] = [12, 2];
  const sigmas = scheduleSigmas('normal', steps);
  const skipLayer = { layers: [2, 3], scale: 1, start: 0.2, end: 0.6, rule: 'steps' } as const;

  /** A picture of 64 x 64 pixels, which the model was trained on. */
  async function draw(cache?: StepCache, options: { sampler?: SamplerName; guided?: boolean; batch?: number } = {}) {
    const { sampler = 'euler', guided = false, batch = 1 } = options;
    const shape = [batch, config.inChannels, 8, 8];
    const denoise = guidedDenoiser({
      velocity: ({ latent, sigma, passes, skipLayers }) => {
        const of = { positive, negative, 'positive-skipping-layers': { ...positive, skipLayers } };
        const times = new Float32Array(batch).fill(timestep(sigma));
        return transformer.velocities(
          latent,
          times,
          passes.map((pass) => of[pass]),
          { cache },
        );
      },
      shape,
      cfg,
      steps,
      ...(guided && { skipLayer }),
    });
    let latent = torchGenerator(5).normal(elementCount(shape));
    for await (const step of samplers[sampler](denoise, latent, sigmas)) latent = step.latent;
    return imageFromTensor(await vae.decode(floats(shape, latent)));
  }
  type Pictures = Awaited<ReturnType<typeof draw>>;

  /** Peak signal-to-noise ratio of the first pictures in decibels. */
  function psnr([a]: Pictures, [b]: Pictures): number {
    const squares = a!.data.reduce((sum, value, i) => sum + (value - b!.data[i]!) ** 2, 0);
    return 10 * Math.log10(255 ** 2 / (squares / a!.data.length));
  }

  it('are the same at a threshold of 0, and differ more the higher it is', async () => {
    const full = await draw();
    const exact = createStepCache({ threshold: 0 });
    expect(await draw(exact)).toEqual(full);
    expect(exact).toMatchObject({ computed: steps, reused: 0 });
    const [near, far] = [createStepCache({ threshold: 0.15 }), createStepCache({ threshold: 0.5 })];
    const [nearPicture, farPicture] = [await draw(near), await draw(far)];
    expect(near.computed + near.reused).toBe(steps);
    expect(near.reused).toBeGreaterThan(0);
    expect(far.reused).toBeGreaterThan(near.reused);
    expect(psnr(nearPicture, full)).toBeGreaterThan(30);
    expect(psnr(farPicture, full)).toBeLessThan(psnr(nearPicture, full));
  });

  it('stay near with skip-layer guidance, whose window opens and closes during the run', async () => {
    const full = await draw(undefined, { guided: true });
    const cache = createStepCache({ threshold: 0.15 });
    const picture = await draw(cache, { guided: true });
    expect(cache.reused).toBeGreaterThan(0);
    expect(psnr(picture, full)).toBeGreaterThan(30);
  });

  it('stay near with a sampler of two evaluations a step, and in a batch', async () => {
    const full = await draw(undefined, { sampler: 'heun', batch: 2 });
    const cache = createStepCache({ threshold: 0.15 });
    const pictures = await draw(cache, { sampler: 'heun', batch: 2 });
    expect(cache.computed + cache.reused).toBe(2 * steps - 1);
    expect(cache.reused).toBeGreaterThan(0);
    expect(psnr(pictures, full)).toBeGreaterThan(30);
    expect(psnr(pictures.slice(1), full.slice(1))).toBeGreaterThan(30);
  });
});
