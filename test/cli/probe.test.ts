import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { floats, type TensorData, toFloat16 } from '../../src/tensor/data.ts';
import { blobSource, openSafetensors, readTensor, serializeSafetensors } from '../../src/weights/safetensors.ts';
import { mmditx } from '../support/cli.ts';
import { golden, readGolden } from '../support/golden.ts';
import { maxDifference } from '../support/run.ts';

const MODEL = 'test/golden/tiny_sd35.safetensors';
let folder: string;
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'mmditx-probe-'));
});
afterAll(() => rm(folder, { recursive: true }));

/** Runs a probe as a user would, through files. */
async function probe(part: string, inputs: Record<string, TensorData>, ...options: string[]) {
  const [input, output] = [join(folder, 'in.safetensors'), join(folder, 'out.safetensors')];
  await writeFile(input, serializeSafetensors(new Map(Object.entries(inputs))));
  const model = options.includes('--model') ? [] : ['--model', MODEL];
  const result = await mmditx(['probe', part, ...model, '--in', input, '--out', output, ...options]);
  expect(result).toEqual({ code: 0, stdout: '', stderr: '' });
  const file = await openSafetensors(blobSource(new Blob([await readFile(output)]), 'out.safetensors'));
  const outputs: Record<string, TensorData> = {};
  for (const name of file.tensors.keys()) outputs[name] = await readTensor(file, name);
  expect(Object.values(outputs).every(({ dtype }) => dtype === 'float32')).toBe(true);
  return outputs;
}

describe('probe agrees with the reference implementations', () => {
  const text = readGolden('text');
  const vae = readGolden('vae');
  const mmdit = readGolden('mmdit');
  const sampling = readGolden('sampling');
  const training = readGolden('train');

  it('clip_l', async () => {
    const { hidden, pooled } = await probe('clip_l', { ids: golden(text, 'ids.clip_l') });
    expect(maxDifference(hidden!, golden(text, 'clip_l.hidden_penultimate'))).toBeLessThan(1e-5);
    expect(maxDifference(pooled!, golden(text, 'clip_l.pooled'))).toBeLessThan(1e-5);
  });

  it('clip_g', async () => {
    const { hidden, pooled } = await probe('clip_g', { ids: golden(text, 'ids.clip_g') });
    expect(maxDifference(hidden!, golden(text, 'clip_g.hidden_penultimate'))).toBeLessThan(1e-5);
    expect(maxDifference(pooled!, golden(text, 'clip_g.pooled'))).toBeLessThan(1e-5);
  });

  it('t5', async () => {
    const { hidden } = await probe('t5', { ids: golden(text, 'ids.t5_256') });
    expect(maxDifference(hidden!, golden(text, 't5.out_256'))).toBeLessThan(2e-5);
  });

  const transformerInputs = (name: string) =>
    Object.fromEntries(
      ['latent', 'timestep', 'context', 'pooled'].map((key) => [key, golden(mmdit, `${name}.in.${key}`)]),
    );

  it('transformer', async () => {
    const { velocity } = await probe('transformer', transformerInputs('A'));
    expect(maxDifference(velocity!, golden(mmdit, 'A.out'))).toBeLessThan(6e-6);
  });

  it('transformer without some layers', async () => {
    const { velocity } = await probe('transformer', transformerInputs('A'), '--skip-layers', '1,2');
    expect(maxDifference(velocity!, golden(mmdit, 'A.out.skip1_2'))).toBeLessThan(6e-6);
  });

  it('vae_encode', async () => {
    const { moments } = await probe('vae_encode', { image: golden(vae, 'B.in.image') });
    expect(maxDifference(moments!, golden(vae, 'B.moments'))).toBeLessThan(5e-5);
  });

  it('vae_decode', async () => {
    const { image } = await probe('vae_decode', { latent: golden(vae, 'B.in.latent_scaled') });
    expect(maxDifference(image!, golden(vae, 'B.decoded'))).toBeLessThan(5e-5);
  });

  const steps = ['--steps', '8', '--cfg', '5', '--shift', '3'];
  const slg = ['--slg-layers', '1,2', '--slg-scale', '2.5', '--slg-start', '0.01', '--slg-end', '0.5'];
  const runs: Record<string, string[]> = {
    euler: ['--sampler', 'euler', '--scheduler', 'normal'],
    euler_slg: ['--sampler', 'euler', '--scheduler', 'normal', ...slg, '--slg-rule', 'steps'],
    dpmpp_2m: ['--sampler', 'dpmpp_2m', '--scheduler', 'normal'],
    dpmpp_2m_slg: ['--sampler', 'dpmpp_2m', '--scheduler', 'normal', ...slg, '--slg-rule', 'steps'],
    'comfy.euler_slg': ['--sampler', 'euler', '--scheduler', 'normal', ...slg, '--slg-rule', 'sigma'],
    'comfy.euler_sgm': ['--sampler', 'euler', '--scheduler', 'sgm_uniform'],
    'comfy.dpmpp_2m_sgm': ['--sampler', 'dpmpp_2m', '--scheduler', 'sgm_uniform'],
  };
  for (const sampler of ['heun', 'dpm_2', 'res_multistep', 'ipndm', 'deis', 'gradient_estimation']) {
    runs[`comfy.${sampler}`] = ['--sampler', sampler, '--scheduler', 'sgm_uniform'];
  }
  const sampleInputs = {
    noise: golden(sampling, 'noise'),
    context: golden(text, 'cond.context'),
    pooled: golden(text, 'cond.pooled'),
    negative_context: golden(text, 'uncond.context'),
    negative_pooled: golden(text, 'uncond.pooled'),
  };
  for (const [name, options] of Object.entries(runs)) {
    it(`sample: ${name}`, async () => {
      const { latent } = await probe('sample', sampleInputs, ...steps, ...options);
      const trajectory = sampling.get(`${name}.x`)?.data as Float32Array | undefined;
      const expected = trajectory?.slice(-latent!.data.length) ?? golden(sampling, `${name}.out`).data;
      expect(maxDifference(latent!, { data: expected })).toBeLessThan(1e-4);
    });
  }

  it('sample: the noise of a stochastic sampler comes from the seed', async () => {
    const options = ['--steps', '2', '--sampler', 'euler_ancestral', '--cfg', '1'];
    const { negative_context, negative_pooled, ...inputs } = sampleInputs;
    const [plain, zero, one] = [[], ['--seed', '0'], ['--seed', '1']].map(
      (seed) => () => probe('sample', inputs, ...options, ...seed),
    );
    const first = await plain!();
    expect(await zero!()).toEqual(first);
    expect(maxDifference((await one!()).latent!, first.latent!)).toBeGreaterThan(0.01);
  });

  it('reads 64-bit ids and half-precision values', async () => {
    const ids = golden(text, 'ids.t5_77');
    const wide: TensorData = { ...ids, dtype: 'int64', data: BigInt64Array.from(ids.data as Int32Array, BigInt) };
    expect(await probe('t5', { ids: wide })).toEqual(await probe('t5', { ids }));
    const latent = golden(vae, 'B.in.latent_scaled');
    const half: TensorData = { ...latent, dtype: 'float16', data: toFloat16(latent.data as Float32Array) };
    const { image } = await probe('vae_decode', { latent: half });
    const difference = maxDifference(image!, golden(vae, 'B.decoded'));
    expect(difference).toBeGreaterThan(0);
    expect(difference).toBeLessThan(0.02);
  });

  it('gradient', async () => {
    const first = (name: string): TensorData => {
      const { shape, data, dtype } = golden(training, name);
      return { dtype, shape: shape.slice(1), data: data.slice(0, data.length / 3) };
    };
    const inputs = {
      latent: golden(training, 'in.x0'),
      noise: first('in.noise'),
      sigma: first('in.sigma'),
      context: golden(training, 'in.context'),
      pooled: golden(training, 'in.pooled'),
    };
    const { loss, ...gradients } = await probe('gradient', inputs, '--model', 'test/golden/train_model.safetensors');
    expect(Math.abs(Number(loss!.data[0]) / Number(golden(training, 'step0.loss').data[0]) - 1)).toBeLessThan(1e-5);
    expect(Object.keys(gradients)).toHaveLength(88);
    for (const [name, gradient] of Object.entries(gradients)) {
      const expected = golden(training, `step0.${name}`);
      const largest = (expected.data as Float32Array).reduce((max, value) => Math.max(max, Math.abs(value)), 0);
      expect(gradient.shape, name).toEqual(expected.shape);
      expect(maxDifference(gradient, expected), name).toBeLessThan(1e-4 * largest + 1e-7);
    }
  });

  it('noise', async () => {
    const output = join(folder, 'noise.safetensors');
    const result = await mmditx(['probe', 'noise', '--seed', '23', '--shape', '1x16x8x8', '--out', output]);
    expect(result).toEqual({ code: 0, stdout: '', stderr: '' });
    const file = await openSafetensors(blobSource(new Blob([await readFile(output)]), 'noise'));
    const noise = await readTensor(file, 'noise');
    expect(maxDifference(noise, golden(readGolden('rng'), 'randn.f32.seed23'))).toBeLessThan(2e-6);
  });
});

describe('probe refuses', () => {
  it('an input file without the tensor a part takes', async () => {
    const input = join(folder, 'wrong.safetensors');
    await writeFile(input, serializeSafetensors(new Map([['x', golden(readGolden('text'), 'ids.clip_l')]])));
    const argv = ['probe', 'clip_l', '--model', MODEL, '--in', input, '--out', join(folder, 'no.safetensors')];
    const { code, stderr } = await mmditx(argv);
    expect(code).toBe(1);
    expect(stderr).toMatch(/^mmditx: .*no tensor "ids".*it has x\.\n$/);
  });

  it('ids beyond the vocabulary', async () => {
    const ids: TensorData = { dtype: 'int32', shape: [1, 77], data: new Int32Array(77).fill(1000) };
    const input = join(folder, 'ids.safetensors');
    await writeFile(input, serializeSafetensors(new Map([['ids', ids]])));
    const argv = ['probe', 'clip_l', '--model', MODEL, '--in', input, '--out', join(folder, 'no.safetensors')];
    expect((await mmditx(argv)).stderr).toMatch(/hold 1000; this encoder knows 0 to 999/);
  });

  /** What a probe of wrong inputs says. */
  async function refusal(part: string, inputs: Record<string, TensorData>, ...options: string[]): Promise<string> {
    const input = join(folder, 'bad.safetensors');
    await writeFile(input, serializeSafetensors(new Map(Object.entries(inputs))));
    const argv = ['probe', part, '--model', MODEL, '--in', input, '--out', join(folder, 'no.safetensors'), ...options];
    const { code, stdout, stderr } = await mmditx(argv);
    expect({ code, stdout }).toEqual({ code: 1, stdout: '' });
    expect(stderr).toMatch(/^mmditx: [^\n]+\.\n$/);
    return stderr;
  }
  const zeros = (...shape: number[]) => floats(shape, new Float32Array(shape.reduce((a, b) => a * b)));

  it('tensors of the wrong shape', async () => {
    const ids: TensorData = { dtype: 'int32', shape: [1, 76], data: new Int32Array(76) };
    expect(await refusal('clip_g', { ids })).toMatch(/"ids" .* \[1, 76\] where \[batch, 77\]/);
    const inputs = { latent: zeros(2, 16, 4, 4), timestep: zeros(2), context: zeros(3, 5, 96), pooled: zeros(2, 80) };
    expect(await refusal('transformer', inputs)).toMatch(/"context" .* \[3, 5, 96\] where \[batch or 1, tokens, 96\]/);
    expect(await refusal('transformer', { ...inputs, timestep: zeros(3) })).toMatch(/"timestep" .*\[batch = 2\]/);
  });

  it('sizes that do not fit the model', async () => {
    expect(await refusal('transformer', { latent: zeros(1, 16, 3, 4) })).toMatch(/3x4.*multiples of 2 up to 48/);
    expect(await refusal('transformer', { latent: zeros(1, 16, 4, 50) })).toMatch(/4x50/);
    expect(await refusal('vae_encode', { image: zeros(1, 3, 8, 12) })).toMatch(/12x8.*multiples of 8/);
    const noise = await mmditx(['probe', 'noise', '--seed', '0', '--shape', '99999x99999', '--out', 'no.safetensors']);
    expect(noise).toMatchObject({ code: 1, stderr: expect.stringMatching(/^mmditx: Noise of shape 99999x99999.*\n$/) });
  });

  it('ids that are no integers', async () => {
    expect(await refusal('t5', { ids: zeros(1, 4) })).toMatch(/float32.*integers/);
  });

  it('a model without the part', async () => {
    const ids = golden(readGolden('text'), 'ids.clip_l');
    const options = ['--model', 'test/golden/train_model.safetensors'];
    const input = join(folder, 'ids.safetensors');
    await writeFile(input, serializeSafetensors(new Map([['ids', ids]])));
    const argv = ['probe', 'clip_l', ...options, '--in', input, '--out', join(folder, 'no.safetensors')];
    expect((await mmditx(argv)).stderr).toMatch(/^mmditx: There is no CLIP-L text encoder in .*train_model.*\n$/);
  });

  it.each([
    ['/dev/full', /disk is full/],
    ['/proc/out.safetensors', /Cannot write/],
    ['package.json/out.safetensors', /Cannot write/],
  ])('the output %s', async (out, message) => {
    const { code, stderr } = await mmditx(['probe', 'noise', '--seed', '1', '--shape', '4', '--out', out]);
    expect(code).toBe(1);
    expect(stderr).toMatch(message);
  });

  it('an option of another part, as wrong usage', async () => {
    const { code, stderr } = await mmditx([
      'probe',
      'noise',
      '--seed',
      '1',
      '--shape',
      '4',
      '--out',
      'x',
      '--steps',
      '3',
    ]);
    expect(code).toBe(2);
    expect(stderr).toMatch(/--steps/);
  });

  it('a part it does not know, as wrong usage', async () => {
    const { code, stderr } = await mmditx(['probe', 'unet', '--out', 'x']);
    expect(code).toBe(2);
    expect(stderr).toMatch(/unet/);
  });
});
