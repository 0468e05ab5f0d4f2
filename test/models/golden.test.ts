import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { type Autoencoder, latentOf, loadAutoencoder } from '../../src/models/autoencoder.ts';
import { type ClipEncoder, loadClip, loadT5, type T5Encoder } from '../../src/models/text-encoders.ts';
import { loadTransformer, type Transformer } from '../../src/models/transformer.ts';
import type { FloatTensor } from '../../src/tensor/index.ts';
import { golden, readGolden } from '../support/golden.ts';
import { goldenCheckpoint } from '../support/models.ts';
import { cpu, maxDifference } from '../support/run.ts';

const parts = (await goldenCheckpoint()).parts;

describe('the transformer agrees with the reference implementations', () => {
  const tensors = readGolden('mmdit');
  const get = (name: string) => golden(tensors, name) as FloatTensor;
  let transformer: Transformer;
  beforeAll(() => {
    transformer = loadTransformer(cpu, parts.transformer!);
  });
  afterAll(() => transformer.dispose());

  const skips = { '': [], skip1_2: [1, 2], skip0: [0], skip2: [2] };
  for (const name of ['A', 'B', 'C', 'D']) {
    for (const [suffix, skipLayers] of Object.entries(skips)) {
      const output = suffix ? `${name}.out.${suffix}` : `${name}.out`;
      if (!tensors.has(output)) continue;
      it(`case ${output}`, async () => {
        const pass = { context: get(`${name}.in.context`), pooled: get(`${name}.in.pooled`), skipLayers };
        const timesteps = get(`${name}.in.timestep`).data;
        const [velocity] = await transformer.velocities(get(`${name}.in.latent`), timesteps, [pass]);
        expect(velocity!.shape).toEqual(get(output).shape);
        expect(maxDifference(velocity!, get(output))).toBeLessThan(6e-6);
      });
    }
  }

  it('gives the same when passes share a batch and their first blocks', async () => {
    const [context, pooled] = [get('B.in.context'), get('B.in.pooled')];
    const passes = [
      { context, pooled },
      { context, pooled, skipLayers: [1, 2] },
      { context: get('B.in.context'), pooled: get('B.in.pooled') },
    ];
    const [whole, skipped, again] = await transformer.velocities(get('B.in.latent'), get('B.in.timestep').data, passes);
    expect(maxDifference(whole!, get('B.out'))).toBeLessThan(6e-6);
    expect(maxDifference(again!, get('B.out'))).toBeLessThan(6e-6);
    expect(maxDifference(skipped!, get('B.out.skip1_2'))).toBeLessThan(6e-6);
  });

  it('refuses to skip a layer that does not exist', async () => {
    const pass = { context: get('D.in.context'), pooled: get('D.in.pooled'), skipLayers: [4] };
    await expect(transformer.velocities(get('D.in.latent'), [1], [pass])).rejects.toThrow(/no layer 4.*0 to 3/);
  });
});

describe('the text encoders agree with the reference implementations', () => {
  const tensors = readGolden('text');
  const get = (name: string) => golden(tensors, name) as FloatTensor;
  const encoders: { clipL?: ClipEncoder; clipG?: ClipEncoder; t5?: T5Encoder } = {};
  beforeAll(() => {
    encoders.clipL = loadClip(cpu, parts.clipL!);
    encoders.clipG = loadClip(cpu, parts.clipG!);
    encoders.t5 = loadT5(cpu, parts.t5!);
  });
  afterAll(() => Promise.all(Object.values(encoders).map((encoder) => encoder.dispose())));

  it('CLIP-L', async () => {
    const { hidden, pooled } = await encoders.clipL!.encode(get('ids.clip_l'));
    expect(maxDifference(hidden, get('clip_l.hidden_penultimate'))).toBeLessThan(1e-5);
    expect(maxDifference(pooled, get('clip_l.pooled'))).toBeLessThan(1e-5);
  });
  it('CLIP-G', async () => {
    const { hidden, pooled } = await encoders.clipG!.encode(get('ids.clip_g'));
    expect(maxDifference(hidden, get('clip_g.hidden_penultimate'))).toBeLessThan(1e-5);
    expect(maxDifference(pooled, get('clip_g.pooled'))).toBeLessThan(1e-5);
  });
  for (const tokens of [77, 256]) {
    it(`T5 with ${tokens} tokens`, async () => {
      const hidden = await encoders.t5!.encode(get(`ids.t5_${tokens}`));
      expect(maxDifference(hidden, get(`t5.out_${tokens}`))).toBeLessThan(2e-5);
    });
  }
});

describe('the VAE agrees with the reference implementations', () => {
  const tensors = readGolden('vae');
  const get = (name: string) => golden(tensors, name) as FloatTensor;
  let vae: Autoencoder;
  beforeAll(() => {
    vae = loadAutoencoder(cpu, parts.vae!);
  });
  afterAll(() => vae.dispose());

  for (const name of ['A', 'B']) {
    it(`case ${name} encodes`, async () => {
      const moments = await vae.encode(get(`${name}.in.image`));
      expect(maxDifference(moments, get(`${name}.moments`))).toBeLessThan(5e-5);
      const mean = latentOf(moments, vae.config);
      expect(maxDifference(mean, get(`${name}.latent_mean_scaled`))).toBeLessThan(5e-5);
      const sampled = latentOf(moments, vae.config, get(`${name}.noise`));
      expect(maxDifference(sampled, get(`${name}.latent_sampled_scaled`))).toBeLessThan(5e-5);
    });
    it(`case ${name} decodes`, async () => {
      const image = await vae.decode(get(`${name}.in.latent_scaled`));
      expect(maxDifference(image, get(`${name}.decoded`))).toBeLessThan(5e-5);
    });
  }
});
