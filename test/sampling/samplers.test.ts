import { describe, expect, it } from 'vitest';
import { samplerNoise } from '../../src/sampling/noise.ts';
import { type SamplerName, samplerNames, samplers } from '../../src/sampling/samplers.ts';
import { scheduleSigmas } from '../../src/sampling/schedules.ts';
import type { Denoiser, SamplerOptions, SamplerStep } from '../../src/sampling/steps.ts';
import { golden, maxDifference, readGolden } from '../support/golden.ts';

const stochasticNames: readonly SamplerName[] = [
  'euler_ancestral',
  'dpmpp_2m_sde',
  'dpmpp_2m_sde_heun',
  'dpmpp_sde',
  'lcm',
];

async function collect(
  sampler: SamplerName,
  denoise: Denoiser,
  latent: Float32Array,
  sigmas: ArrayLike<number>,
  options: SamplerOptions = {},
): Promise<SamplerStep[]> {
  const steps: SamplerStep[] = [];
  const all = { noise: samplerNoise(1, latent.length), ...options };
  for await (const step of samplers[sampler](denoise, latent, sigmas, all)) steps.push(step);
  return steps;
}

describe('step by step against reference trajectories, given their predictions', () => {
  const tensors = readGolden('sampling');
  const rows = (name: string) => {
    const { data, shape } = golden(tensors, name);
    const size = data.length / shape[0]!;
    return Array.from({ length: shape[0]! }, (_, i) => (data as Float32Array).subarray(i * size, (i + 1) * size));
  };

  it.each([
    ['euler', 'euler', 'sigmas'],
    ['euler_slg', 'euler', 'sigmas'],
    ['img2img', 'euler', 'img2img.sigmas'],
    ['dpmpp_2m', 'dpmpp_2m', 'sigmas'],
    ['dpmpp_2m_slg', 'dpmpp_2m', 'sigmas'],
  ] as const)('%s', async (name, sampler, schedule) => {
    const latents = rows(`${name}.x`);
    const predictions = rows(`${name}.denoised`);
    const sigmas = golden(tensors, schedule).data as Float32Array;
    let call = 0;
    const replay: Denoiser = async (latent, sigma) => {
      expect(sigma).toBe(sigmas[call]);
      expect(maxDifference(latent, latents[call]!), `latent of call ${call}`).toBeLessThan(2e-5);
      return predictions[call++]!;
    };
    const steps = await collect(sampler, replay, latents[0]!, sigmas);
    expect(steps).toHaveLength(predictions.length);
    expect(maxDifference(steps.at(-1)!.latent, latents.at(-1)!)).toBeLessThan(2e-5);
  });
});

/**
 * Images whose every value is normal with this mean and deviation. Their best denoiser and the flow it defines are
 * known: the flow carries the noise z to MEAN + DEVIATION * z.
 */
const MEAN = 1.5;
const DEVIATION = 0.4;

const gaussian: Denoiser = async (latent, sigma) => {
  const signal = (1 - sigma) * DEVIATION ** 2;
  const gain = signal / ((1 - sigma) * signal + sigma ** 2);
  return latent.map((value) => MEAN + gain * (value - (1 - sigma) * MEAN));
};

describe('on normally distributed images, where the answer is known', () => {
  const noise = Float32Array.of(1, -2, 0.5);
  const answer = noise.map((z) => MEAN + DEVIATION * z);

  async function error(sampler: SamplerName, steps: number): Promise<number> {
    const sigmas = scheduleSigmas('sgm_uniform', steps, { shift: 1 });
    const result = await collect(sampler, gaussian, noise, sigmas, { eta: 0, shift: 1 });
    return maxDifference(result.at(-1)!.latent, answer);
  }

  it.each(['euler', 'euler_ancestral', 'gradient_estimation'] as const)(
    '%s without noise is of first order: twice the steps, half the error',
    async (sampler) => {
      const ratio = (await error(sampler, 80)) / (await error(sampler, 160));
      expect(ratio).toBeGreaterThan(1.8);
      expect(ratio).toBeLessThan(2.2);
    },
  );

  it.each([
    'heun',
    'dpm_2',
    'dpmpp_2m',
    'dpmpp_2m_sde',
    'dpmpp_2m_sde_heun',
    'dpmpp_sde',
    'res_multistep',
    'ipndm',
    'deis',
  ] as const)('%s without noise is of second order: twice the steps, a quarter of the error', async (sampler) => {
    // Not quite a quarter: the first and last steps are of first order, and float32 has its share.
    expect((await error(sampler, 80)) / (await error(sampler, 160))).toBeGreaterThan(2.7);
    expect(await error(sampler, 160)).toBeLessThan(1e-3);
  });

  it.each(['euler_ancestral', 'dpmpp_2m_sde', 'dpmpp_2m_sde_heun', 'dpmpp_sde'] as const)(
    '%s with noise draws from the distribution of the images',
    async (sampler) => {
      const latent = samplerNoise(5, 4000)();
      const sigmas = scheduleSigmas('sgm_uniform', 240);
      const images = (await collect(sampler, gaussian, latent, sigmas)).at(-1)!.latent;
      const mean = images.reduce((sum, value) => sum + value, 0) / images.length;
      const variance = images.reduce((sum, value) => sum + (value - mean) ** 2, 0) / images.length;
      expect(mean).toBeCloseTo(MEAN, 1);
      // The sampling error of the deviation is 0.005; the rest is left to the finite number of steps.
      expect(Math.abs(Math.sqrt(variance) - DEVIATION)).toBeLessThan(0.03);
    },
  );
});

describe.each(samplerNames)('%s', (sampler) => {
  const target = Float32Array.of(0.25, -1, 2);
  const constant: Denoiser = async () => target.slice();
  const start = Float32Array.of(1, 1, -1);

  it('ends on the image when the denoiser knows it, at any number of steps', async () => {
    for (const steps of [1, 2, 3, 4, 5, 9]) {
      const result = await collect(sampler, constant, start, scheduleSigmas('normal', steps));
      expect(result).toHaveLength(steps);
      expect(result.map(({ step }) => step)).toEqual(result.map((_, i) => i + 1));
      expect(result.at(-1)!.sigmaNext).toBe(0);
      expect(maxDifference(result.at(-1)!.latent, target)).toBeLessThan(1e-6);
      expect(maxDifference(result[0]!.denoised, target)).toBe(0);
    }
  });

  it('passes over a sigma that repeats', async () => {
    const once = await collect(sampler, gaussian, start, [1, 0.8, 0.5, 0.2, 0]);
    const twice = await collect(sampler, gaussian, start, [1, 0.8, 0.8, 0.5, 0.2, 0]);
    expect(twice.map(({ step }) => step)).toEqual([1, 3, 4, 5]);
    expect(twice.at(-1)!.latent).toEqual(once.at(-1)!.latent);
  });

  it('stays finite with thousands of steps', async () => {
    const result = await collect(sampler, gaussian, start, scheduleSigmas('normal', 10_000).subarray(0, 10));
    expect(result.at(-1)!.latent.every(Number.isFinite)).toBe(true);
  });

  it('leaves its input and the latents it has yielded alone', async () => {
    const seen: [Float32Array, Float32Array][] = [];
    const latent = start.slice();
    const noise = samplerNoise(3, 3);
    for await (const step of samplers[sampler](gaussian, latent, scheduleSigmas('normal', 6), { noise })) {
      seen.push([step.latent, step.latent.slice()]);
    }
    expect(latent).toEqual(start);
    for (const [kept, copy] of seen) expect(kept).toEqual(copy);
  });

  it('stops before the next step when aborted', async () => {
    const controller = new AbortController();
    const reason = new Error('enough');
    let done = 0;
    const run = async () => {
      const options = { noise: samplerNoise(1, 3), signal: controller.signal };
      for await (const { step } of samplers[sampler](constant, start, scheduleSigmas('normal', 5), options)) {
        done = step;
        if (step === 2) controller.abort(reason);
      }
    };
    await expect(run()).rejects.toBe(reason);
    expect(done).toBe(2);
  });

  it('gives the same for the same noise, and uses noise only if it is stochastic', async () => {
    const sigmas = scheduleSigmas('sgm_uniform', 6);
    const final = async (seed: number) =>
      (await collect(sampler, gaussian, start, sigmas, { noise: samplerNoise(seed, 3) })).at(-1)!.latent;
    expect(await final(8)).toEqual(await final(8));
    if (stochasticNames.includes(sampler)) expect(await final(8)).not.toEqual(await final(9));
    else expect(await final(8)).toEqual(await final(9));
  });
});

it.each(stochasticNames)('%s asks for a source of noise', async (sampler) => {
  const steps = samplers[sampler](gaussian, new Float32Array(3), scheduleSigmas('normal', 2));
  await expect(steps.next()).rejects.toThrow(/source of noise/);
});

it('the SDE samplers start just below pure noise, where the shift puts it', async () => {
  const first = async (shift: number) =>
    (await collect('dpmpp_sde', gaussian, new Float32Array(3), [1, 0.5, 0], { shift }))[0]!.sigma;
  expect(1 - (await first(3))).toBeCloseTo(1e-4 / 3, 7);
  expect(1 - (await first(1))).toBeCloseTo(1e-4, 7);
});
