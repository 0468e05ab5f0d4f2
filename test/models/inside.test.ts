/** The steps inside the networks, found in the recorded programs, against the reference implementations' own. */

import { describe, expect, it } from 'vitest';
import { bindWeights } from '../../src/models/bind.ts';
import { clip, clipInputs, endOfText } from '../../src/models/clip.ts';
import {
  centreCorner,
  mmditx,
  mmditxSegment,
  stageCount,
  timestepEmbedding,
  transformerInputs,
} from '../../src/models/mmditx.ts';
import { relativeBuckets, t5Encoder, t5Inputs } from '../../src/models/t5.ts';
import { decode, encodeMoments, imageInput, latentInput } from '../../src/models/vae.ts';
import { inOrder } from '../../src/tensor/gradient.ts';
import type { FloatTensor, Tensor, TensorData } from '../../src/tensor/index.ts';
import type { PartWeights } from '../../src/weights/checkpoint.ts';
import { golden, readGolden } from '../support/golden.ts';
import { goldenCheckpoint } from '../support/models.ts';
import { cpu, maxDifference } from '../support/run.ts';

const { parts } = await goldenCheckpoint();

/** Runs a recorded network and gives the tensors asked for. */
async function inside(
  bound: ReturnType<typeof bindWeights>,
  outputs: Record<string, Tensor>,
  inputs: Record<string, TensorData>,
): Promise<Record<string, FloatTensor>> {
  const executable = await cpu.compile({ outputs }, bound);
  const results = await executable.run(inputs);
  await executable.dispose();
  return results as Record<string, FloatTensor>;
}

/** All tensors of an operation, in the order they are computed. */
function computedBy(operation: string, output: Tensor): Tensor[] {
  return inOrder([output]).filter((tensor) => tensor.operation.name === operation);
}

const bindingOf = (part: PartWeights<unknown>) => bindWeights(part);

describe('inside the transformer', () => {
  it('every step of case B agrees', async () => {
    const tensors = readGolden('mmdit');
    const get = (name: string) => golden(tensors, name) as FloatTensor;
    const { config } = parts.transformer!;
    const bound = bindingOf(parts.transformer!);
    const velocity = mmditx(config, bound.weights, transformerInputs(config));
    const attentions = computedBy('MultiHeadAttention', velocity);
    const sums = computedBy('Add', velocity);
    // Queries, keys and values of the joint attention are context and image side by side.
    const [joint, dual] = attentions as [Tensor, Tensor];
    const [query, key] = joint.inputs as [Tensor, Tensor];
    // The patches and their positions, the timestep and the pooled text are each added once.
    const patches = sums.find(({ inputs }) => computedBy('Crop', inputs[1]!).length > 0)!;
    const embeddings = sums.find(({ shape }) => shape.length === 2)!;
    const outputs: Record<string, Tensor> = {
      patch_embed: patches.inputs[0]!,
      pos_crop: patches.inputs[1]!,
      t_emb: embeddings.inputs[0]!,
      y_emb: embeddings.inputs[1]!,
      c: embeddings,
      'block0.x_q': query.inputs[1]!,
      'block0.ctx_k': key.inputs[0]!,
      'block0.joint_attn': joint,
      'block0.x_attn2': dual,
      'block0.x_k2': dual.inputs[1]!,
    };
    const latent = get('B.in.latent');
    const [rows, columns] = [latent.shape[2]! / 2, latent.shape[3]! / 2];
    const results = await inside(bound, outputs, {
      latent,
      timestep: timestepEmbedding(get('B.in.timestep').data, config.timestepWidth),
      context: get('B.in.context'),
      pooled: get('B.in.pooled'),
      corner: centreCorner(config.tableSize, rows, columns),
    });
    for (const [name, result] of Object.entries(results)) {
      expect(maxDifference(result, get(`B.mid.${name}`)), name).toBeLessThan(6e-6);
    }
  });
});

describe('segments of the transformer', () => {
  it('hand on the streams of the reference after every block', async () => {
    const tensors = readGolden('mmdit');
    const get = (name: string) => golden(tensors, name) as FloatTensor;
    const { config } = parts.transformer!;
    const latent = get('B.in.latent');
    const corner = centreCorner(config.tableSize, latent.shape[2]! / 2, latent.shape[3]! / 2);
    let flow: Record<string, TensorData> = {
      latent,
      timestep: timestepEmbedding(get('B.in.timestep').data, config.timestepWidth),
      context: get('B.in.context'),
      pooled: get('B.in.pooled'),
    };
    for (let stage = 0; stage < stageCount(config) - 1; stage++) {
      const bound = bindingOf(parts.transformer!);
      const { outputs } = mmditxSegment(config, bound.weights, stage, stage + 1);
      flow = await inside(bound, outputs, { ...flow, corner });
      const context = stage === 0 ? 'context_embed' : `block${stage - 1}.context`;
      if (stage < config.depth)
        expect(maxDifference(flow.context!, get(`B.mid.${context}`)), context).toBeLessThan(6e-6);
      if (stage > 0) expect(maxDifference(flow.image!, get(`B.mid.block${stage - 1}.x`))).toBeLessThan(6e-6);
    }
    const bound = bindingOf(parts.transformer!);
    const { velocity } = mmditxSegment(config, bound.weights, config.depth + 1, stageCount(config)).outputs;
    const tokens = velocity!.inputs[0]!.inputs[0]!.inputs[0]!;
    const results = await inside(bound, { tokens, velocity: velocity! }, flow);
    expect(maxDifference(results.tokens!, get('B.mid.final_tokens'))).toBeLessThan(6e-6);
    expect(maxDifference(results.velocity!, get('B.out'))).toBeLessThan(6e-6);
  });
});

describe('inside the text encoders', () => {
  const tensors = readGolden('text');
  const get = (name: string) => golden(tensors, name) as FloatTensor;

  it('CLIP-L after its last layer', async () => {
    const { config } = parts.clipL!;
    const bound = bindingOf(parts.clipL!);
    const { pooled } = clip(config, bound.weights, clipInputs(config));
    const ids = get('ids.clip_l') as TensorData;
    // Without a projection the pooled vector is looked up in the last hidden state.
    const last = pooled.inputs[0]!.inputs[0]!;
    const results = await inside(bound, { last }, { ids });
    expect(maxDifference(results.last!, get('clip_l.last'))).toBeLessThan(1e-5);
  });

  it('CLIP-G before its projection', async () => {
    const { config } = parts.clipG!;
    const bound = bindingOf(parts.clipG!);
    const { pooled } = clip(config, bound.weights, clipInputs(config));
    const ids = get('ids.clip_g') as TensorData;
    const raw = pooled.inputs[0]!;
    const results = await inside(bound, { raw }, { ids, end: endOfText(ids.data as Int32Array, config) });
    expect(maxDifference(results.raw!, get('clip_g.pooled_raw'))).toBeLessThan(1e-5);
  });

  it('the distance bias of T5', async () => {
    const { config } = parts.t5!;
    const bound = bindingOf(parts.t5!);
    const hidden = t5Encoder(config, bound.weights, t5Inputs());
    const bias = computedBy('MultiHeadAttention', hidden)[0]!.inputs[3]!;
    const buckets = relativeBuckets(256, config);
    const results = await inside(bound, { bias }, { buckets });
    for (const row of [0, 200]) {
      const expected = get(`t5.rel_bias_row${row}`).data;
      const values = results.bias!.data;
      const own = Array.from(expected, (_, i) => values[(Math.floor(i / 256) * 256 + row) * 256 + (i % 256)]!);
      expect(own).toEqual([...expected]);
    }
  });
});

describe('inside the VAE', () => {
  const tensors = readGolden('vae');
  const get = (name: string) => golden(tensors, name) as FloatTensor;

  it('the first level of the encoder', async () => {
    const { config } = parts.vae!;
    const bound = bindingOf(parts.vae!);
    const moments = encodeMoments(config, bound.weights, imageInput(config));
    const convolutions = computedBy('Conv', moments);
    // conv_in, then two convolutions a block, then the downsampling.
    const outputs = { conv_in: convolutions[0]!, down0_out: convolutions[1 + 2 * config.resBlocks]! };
    const image = get('B.in.image');
    const first = { ...image, shape: [1, ...image.shape.slice(1)], data: image.data.slice(0, image.data.length / 2) };
    const results = await inside(bound, outputs, { image: first });
    expect(maxDifference(results.conv_in!, get('B0.enc.conv_in'))).toBeLessThan(5e-5);
    expect(maxDifference(results.down0_out!, get('B0.enc.down0_out'))).toBeLessThan(5e-5);
  });

  it('the first levels of the decoder', async () => {
    const { config } = parts.vae!;
    const bound = bindingOf(parts.vae!);
    const image = decode(config, bound.weights, latentInput(config));
    const [attended] = computedBy('MultiHeadAttention', image) as [Tensor];
    const midAttention = computedBy('Add', image).find(
      (sum) => computedBy('MultiHeadAttention', sum).includes(attended) && sum.shape.length === 4,
    )!;
    const [upsampled] = computedBy('Upsample', image) as [Tensor];
    const up3 = computedBy('Conv', image).find(({ inputs }) => inputs[0] === upsampled)!;
    const latent = get('B.in.latent_scaled');
    const first = {
      ...latent,
      shape: [1, ...latent.shape.slice(1)],
      data: latent.data.slice(0, latent.data.length / 2),
    };
    const results = await inside(bound, { midAttention, up3 }, { latent: first });
    expect(maxDifference(results.midAttention!, get('B0.dec.mid_attn'))).toBeLessThan(5e-5);
    expect(maxDifference(results.up3!, get('B0.dec.up3_out'))).toBeLessThan(5e-5);
  });
});
