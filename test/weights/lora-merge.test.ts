/** LoRAs merged into a model's file, against the reference implementation's outputs with merged weights. */

import { readFileSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import { bindWeights } from '../../src/models/bind.ts';
import { centreCorner, mmditx, timestepEmbedding, transformerInputs } from '../../src/models/mmditx.ts';
import { type DType, type FloatTensor, floats, type TensorData, toFloat16, toFloat32 } from '../../src/tensor/data.ts';
import { writeFileAtomically } from '../../src/weights/atomic.node.ts';
import { type Checkpoint, openCheckpoint, partNames } from '../../src/weights/checkpoint.ts';
import { convertedMetadata, partPrefixes, plannedTensors } from '../../src/weights/convert.ts';
import { type FileSource, fileSource } from '../../src/weights/files.node.ts';
import { modelFiles } from '../../src/weights/folder.node.ts';
import { combineLoras, type Lora, type LoraUse, openLora } from '../../src/weights/lora.ts';
import { joinLoras, mergeLoras } from '../../src/weights/lora-merge.ts';
import { loraFile } from '../../src/weights/lora-write.ts';
import { type PlannedTensors, plannedSafetensorsChunks, serializeSafetensors } from '../../src/weights/safetensors.ts';
import { readFloats, readWeight } from '../../src/weights/stored.ts';
import { golden, readGolden } from '../support/golden.ts';
import { goldenCheckpoint } from '../support/models.ts';
import { cpu, maxDifference, randomFloats } from '../support/run.ts';
import { bytesSource } from './sources.ts';

async function openGolden(name: string): Promise<Lora> {
  const path = new URL(`../golden/${name}.safetensors`, import.meta.url);
  return openLora(bytesSource(readFileSync(path), `${name}.safetensors`));
}

async function openLayer(tensors: Record<string, TensorData>, name = 'style.safetensors'): Promise<Lora> {
  return openLora(bytesSource(serializeSafetensors(new Map(Object.entries(tensors))), name));
}

async function bytesOf(plans: readonly PlannedTensors[], metadata: Record<string, string>): Promise<Uint8Array> {
  const chunks: Uint8Array[] = [];
  for await (const chunk of plannedSafetensorsChunks(plans, metadata)) chunks.push(chunk);
  return new Uint8Array(await new Blob(chunks as BlobPart[]).arrayBuffer());
}

const folder = await mkdtemp(join(tmpdir(), 'mmditx-merge-'));
const opened: FileSource[] = [];
afterAll(async () => {
  await Promise.all(opened.map((source) => source.close()));
  await rm(folder, { recursive: true });
});

/** A merged model, written to a file that can be mapped. */
async function merge({ parts }: Checkpoint, loras: readonly LoraUse[]): Promise<Checkpoint> {
  const { plans, metadata } = mergeLoras(parts, loras);
  const path = join(folder, `${opened.length}.safetensors`);
  await writeFileAtomically(path, plannedSafetensorsChunks(plans, metadata));
  opened.push(await fileSource(path));
  return openCheckpoint(opened.slice(-1));
}

const kohya = await openGolden('lora_kohya');
const diffusers = await openGolden('lora_diffusers');
const original = await goldenCheckpoint();
const metadata = convertedMetadata(original.parts);

/** The golden model with the element type of its matrices exchanged. */
async function inType(dtype: DType, encode: (values: Float32Array) => TensorData['data']): Promise<Checkpoint> {
  const tensors = new Map(
    [...readGolden('tiny_sd35')].map(([name, tensor]) => [
      name,
      tensor.shape.length < 2 ? tensor : { dtype, shape: tensor.shape, data: encode(toFloat32(tensor)) },
    ]),
  );
  return openCheckpoint([bytesSource(serializeSafetensors(tensors, metadata), `${dtype}.safetensors`)]);
}

const upperHalf = (values: Float32Array) =>
  Uint16Array.from(new Uint32Array(values.slice().buffer), (bits) => bits >>> 16);
const full = await inType('float32', (values) => values);

/** The golden case B. */
async function velocity({ parts }: Checkpoint): Promise<FloatTensor> {
  const model = parts.transformer!;
  const { config } = model;
  const inputs = readGolden('mmdit');
  const bound = bindWeights(model);
  const program = { outputs: { velocity: mmditx(config, bound.weights, transformerInputs(config)) } };
  await bound.read();
  const executable = await cpu.compile(program, { files: bound.files!, bind: bound.bind });
  const latent = golden(inputs, 'B.in.latent');
  const result = await executable.run({
    latent,
    timestep: timestepEmbedding(golden(inputs, 'B.in.timestep').data as Float32Array, config.timestepWidth),
    context: golden(inputs, 'B.in.context'),
    pooled: golden(inputs, 'B.in.pooled'),
    corner: centreCorner(config.tableSize, latent.shape[2]! / config.patchSize, latent.shape[3]! / config.patchSize),
  });
  await executable.dispose();
  return result.velocity as FloatTensor;
}

const outputs = readGolden('lora');

/** Equal type, shape and bits; quicker than comparing typed arrays as objects. */
function expectSame(actual: TensorData, expected: TensorData, name: string): void {
  expect([actual.dtype, ...actual.shape], name).toEqual([expected.dtype, ...expected.shape]);
  expect(maxDifference(actual, expected), name).toBe(0);
}

describe('a merged model', () => {
  it.each([
    ['in kohya layout', [{ lora: kohya, strength: 1 }], 'scale1'],
    ['in diffusers layout', [{ lora: diffusers, strength: 1 }], 'scale1'],
    ['at half strength', [{ lora: kohya, strength: 0.5 }], 'scale0.5'],
    [
      'of two files',
      [
        { lora: diffusers, strength: 1.25 },
        { lora: kohya, strength: -0.75 },
      ],
      'scale0.5',
    ],
  ] as const)('with a LoRA %s gives what the reference gives', async (_, loras, output) => {
    const expected = golden(outputs, `B.out.${output}`);
    expect(maxDifference(await velocity(await merge(full, loras)), expected)).toBeLessThan(6e-6);
  });

  it('in half precision gives what the reference gives, but for rounding', async () => {
    const merged = await merge(original, [{ lora: kohya, strength: 1 }]);
    const error = maxDifference(await velocity(merged), golden(outputs, 'B.out.scale1'));
    expect(error).toBeLessThan(5e-3);
    expect(maxDifference(golden(outputs, 'B.out.scale1'), golden(readGolden('mmdit'), 'B.out'))).toBeGreaterThan(0.1);
  });

  it('has W + strength * alpha / rank * up @ down, and all else bit by bit as it was', async () => {
    const merged = await merge(original, [{ lora: kohya, strength: 0.5 }]);
    const file = readGolden('lora_kohya');
    let changed = 0;
    for (const part of partNames) {
      for (const [name, weight] of original.parts[part]!.tensors) {
        const stored = await readWeight(merged.parts[part]!.tensors.get(name)!);
        const before = await readWeight(weight);
        const layer = `lora_unet_${name.replace(/\.weight$/, '').replaceAll('.', '_')}`;
        if (!file.has(`${layer}.alpha`)) {
          expectSame(stored, before, name);
          continue;
        }
        changed++;
        const [up, down] = ['up', 'down'].map((role) => golden(file, `${layer}.lora_${role}.weight`));
        const [rank, inputs] = down!.shape as [number, number];
        const alpha = toFloat32(golden(file, `${layer}.alpha`))[0]!;
        const [a, b, w] = [toFloat32(up!), toFloat32(down!), toFloat32(before)];
        const sum = w.map((value, at) => {
          let product = 0;
          for (let i = 0; i < rank; i++)
            product += a[Math.floor(at / inputs) * rank + i]! * b[i * inputs + (at % inputs)]!;
          return value + 0.5 * (alpha / rank) * product;
        });
        expect(stored.dtype).toBe('float16');
        // A sum that lies between two halves may go to either.
        expect(maxDifference({ data: toFloat32(stored) }, { data: sum }), name).toBeLessThan(3e-4);
        const halves = toFloat16(sum);
        const off = (stored.data as Uint16Array).filter((bits, at) => bits !== halves[at]).length;
        expect(off / sum.length).toBeLessThan(1e-3);
      }
    }
    expect(changed).toBe(mergeLoras(original.parts, [{ lora: kohya, strength: 0.5 }]).changed);
    expect(changed).toBe(19);
  });

  it('has the same configurations, those that no shape tells, too', async () => {
    const merged = await merge(original, [{ lora: kohya, strength: 1 }]);
    for (const part of partNames) expect(merged.parts[part]!.config).toEqual(original.parts[part]!.config);
  });

  it.each([
    ['float32', 'float32', 0, (values: Float32Array) => values],
    ['bfloat16', 'bfloat16', 0, upperHalf],
    ['float64', 'float64', 0, (values: Float32Array) => Float64Array.from(values)],
    // The upper half of a half-precision number.
    ['float8e5m2', 'float16', 19, (values: Float32Array) => Uint8Array.from(toFloat16(values), (bits) => bits >>> 8)],
  ] as const)('of %s has %s where it changes', async (dtype, stored, widened, encode) => {
    const model = await inType(dtype, encode);
    const plan = mergeLoras(model.parts, [{ lora: kohya, strength: 1 }]);
    expect(plan.widened).toBe(widened);
    const merged = await merge(model, [{ lora: kohya, strength: 1 }]);
    const name = 'joint_blocks.0.x_block.attn.qkv.weight';
    const encodingOf = (weight: string) => merged.parts.transformer!.tensors.get(weight)!.spans[0]!.encoding;
    expect(encodingOf(name)).toBe(stored);
    expect(encodingOf('joint_blocks.0.x_block.mlp.fc2.weight')).toBe(dtype);
    const weights = (checkpoint: Checkpoint) => readFloats(checkpoint.parts.transformer!.tensors.get(name)!);
    const exact = await merge(full, [{ lora: kohya, strength: 1 }]);
    const plain = await weights(full);
    const shift = (values: FloatTensor, from: FloatTensor) => ({ data: values.data.map((v, i) => v - from.data[i]!) });
    const change = shift(await weights(merged), await weights(model));
    expect(maxDifference(change, shift(await weights(exact), plain))).toBeLessThan(stored === 'bfloat16' ? 3e-3 : 5e-4);
    expect(maxDifference(change, { data: plain.data.map(() => 0) })).toBeGreaterThan(1e-2);
  });

  it('of int8 has 16 bits where it changes and stays as it is elsewhere', async () => {
    const quantized = await openCheckpoint([
      bytesSource(
        await bytesOf(
          partNames.flatMap((part) => plannedTensors(part, original.parts[part]!, 'int8', partPrefixes[part])),
          metadata,
        ),
      ),
    ]);
    expect(mergeLoras(quantized.parts, [{ lora: kohya, strength: 1 }])).toMatchObject({ changed: 19, widened: 19 });
    const merged = await merge(quantized, [{ lora: kohya, strength: 1 }]);
    const { tensors } = merged.parts.transformer!;
    const changes = combineLoras(
      [{ lora: kohya, strength: 1 }],
      'transformer',
      new Map([...tensors].map(([name, { shape }]) => [name, shape])),
    );
    for (const [name, weight] of quantized.parts.transformer!.tensors) {
      const [before, after] = [await readFloats(weight), await readFloats(tensors.get(name)!)];
      const stays = !changes.has(name);
      expect(tensors.get(name)!.quantized?.precision, name).toBe(stays ? weight.quantized?.precision : undefined);
      if (stays) expectSame(after, before, name);
      else expect(maxDifference(after, before), name).toBeGreaterThan(1e-3);
    }
  });

  it("of diffusers' folders has their values in the official order", async () => {
    const sources = await Promise.all((await modelFiles(resolve('test/fixtures/layouts/diffusers'))).map(fileSource));
    const model = await openCheckpoint(sources);
    const weights = model.parts.transformer!.tensors;
    const [rows, inputs] = weights.get('joint_blocks.0.x_block.attn.qkv.weight')!.shape as [number, number];
    const up = randomFloats([rows / 3, 1], 2);
    const lora = await openLayer({
      'transformer.transformer_blocks.0.attn.to_k.lora_A.weight': randomFloats([1, inputs]),
      'transformer.transformer_blocks.0.attn.to_k.lora_B.weight': up,
    });
    const merged = (await merge(model, [{ lora, strength: 1 }])).parts.transformer!.tensors;
    for (const [name, weight] of weights) {
      const [before, after] = [await readFloats(weight), await readFloats(merged.get(name)!)];
      if (!name.startsWith('joint_blocks.0.x_block.attn.qkv.weight')) {
        expectSame(after, before, name);
        continue;
      }
      const third = (values: FloatTensor, at: number) =>
        values.data.subarray((at * rows * inputs) / 3, ((at + 1) * rows * inputs) / 3);
      expect(third(after, 0)).toEqual(third(before, 0));
      expect(third(after, 2)).toEqual(third(before, 2));
      expect(maxDifference({ data: third(after, 1) }, { data: third(before, 1) })).toBeGreaterThan(0.1);
    }
    await Promise.all(sources.map((source) => source.close()));
  });

  it('changes text encoders by their own strength', async () => {
    const lora = await openLayer({
      'lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight': floats(
        [1, original.parts.clipL!.config.width],
        new Float32Array(original.parts.clipL!.config.width).fill(1),
      ),
      'lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight': floats(
        [original.parts.clipL!.config.mlpWidth, 1],
        new Float32Array(original.parts.clipL!.config.mlpWidth).fill(1),
      ),
    });
    const merged = await merge(full, [{ lora, strength: 0, clipStrength: 0.25 }]);
    const name = 'text_model.encoder.layers.0.mlp.fc1.weight';
    const [before, after] = [full, merged].map(({ parts }) => parts.clipL!.tensors.get(name)!);
    const shifted = (await readFloats(before!)).data.map((value) => value + 0.25);
    expect(maxDifference(await readFloats(after!), { data: shifted })).toBe(0);
  });

  it('holds one weight in memory at a time', async () => {
    let held = 0;
    let most = 0;
    const { plans } = mergeLoras(original.parts, [{ lora: kohya, strength: 1 }]);
    const counted = plans.map(({ tensors, values }) => ({
      tensors,
      values: async () => {
        most = Math.max(most, ++held);
        const made = await values();
        held--;
        return made;
      },
    }));
    await bytesOf(counted, {});
    expect(most).toBe(1);
  });
});

describe('mergeLoras tells', () => {
  it('which networks are absent', () => {
    const { transformer: _, ...rest } = original.parts;
    const use = [{ lora: { ...kohya, parts: { ...kohya.parts, clipL: new Map() } }, strength: 1 }];
    expect(() => mergeLoras(rest, use)).toThrow(/change nothing of this model/);
    const { t5: __, ...others } = original.parts;
    const t5 = new Map([['encoder.block.0.layer.0.SelfAttention.q.weight', []]]);
    expect(mergeLoras(others, [{ lora: { ...kohya, parts: { ...kohya.parts, t5 } }, strength: 1 }]).absent).toEqual([
      't5',
    ]);
  });

  it.each([
    ['no strength', [{ lora: kohya, strength: 0 }], /change nothing of this model/],
    ['no LoRA', [], /change nothing of this model/],
    ['a strength out of range', [{ lora: kohya, strength: 101 }], /strength of lora_kohya\.safetensors is 101/],
  ] as const)('by refusing %s', (_, loras, message) => {
    expect(() => mergeLoras(original.parts, loras)).toThrow(message);
    expect(() => mergeLoras(original.parts, loras)).toThrow(expect.objectContaining({ code: 'bad-option' }));
  });

  it('of a LoRA of another size', async () => {
    const lora = await openLayer({
      'lora_unet_context_embedder.lora_down.weight': randomFloats([2, 3]),
      'lora_unet_context_embedder.lora_up.weight': randomFloats([4, 2]),
    });
    expect(() => mergeLoras(original.parts, [{ lora, strength: 1 }])).toThrow(
      /style\.safetensors does not fit this model/,
    );
  });

  it('of values that the type of the weights cannot hold', async () => {
    const [outputs, inputs] = original.parts.transformer!.tensors.get('context_embedder.weight')!.shape as [
      number,
      number,
    ];
    const lora = await openLayer({
      'lora_unet_context_embedder.lora_down.weight': floats([1, inputs], new Float32Array(inputs).fill(1000)),
      'lora_unet_context_embedder.lora_up.weight': floats([outputs, 1], new Float32Array(outputs).fill(1000)),
    });
    await expect(merge(original, [{ lora, strength: 1 }])).rejects.toMatchObject({
      code: 'not-finite',
      message: expect.stringMatching(
        /context_embedder\.weight" gets values that float16 cannot hold; lower the strengths/,
      ),
    });
    await merge(full, [{ lora, strength: 1 }]);
  });
});

describe('joinLoras', () => {
  const shapes = new Map([...original.parts.transformer!.tensors].map(([name, { shape }]) => [name, shape]));
  const written = (loras: readonly LoraUse[]) =>
    [...combineLoras(loras, 'transformer', shapes)].map(([name, { up, down }]) => {
      const [rank, inputs] = down.shape as [number, number];
      const data = new Float64Array(up.shape[0]! * inputs);
      for (const [at] of data.entries()) {
        for (let i = 0; i < rank; i++)
          data[at]! += up.data[Math.floor(at / inputs) * rank + i]! * down.data[i * inputs + (at % inputs)]!;
      }
      return [name, data] as const;
    });

  it('makes one LoRA that does what several do, of the sum of their ranks', async () => {
    const uses = [
      { lora: kohya, strength: 0.75 },
      { lora: diffusers, strength: -0.25 },
    ];
    const layers = joinLoras(uses);
    expect(new Set(layers.map(({ down }) => down.shape[0]))).toEqual(new Set([8]));
    const { tensors, metadata: own } = loraFile(layers, { format: 'kohya', dtype: 'float32' });
    const joined = await openLora(bytesSource(serializeSafetensors(tensors, own)));
    const actual = new Map(written([{ lora: joined, strength: 1 }]));
    for (const [name, data] of written(uses)) {
      expect(maxDifference({ data: actual.get(name)! }, { data }), name).toBeLessThan(1e-6);
    }
    expect(actual.size).toBe(19);
  });

  it('gives the text encoders their own strengths', async () => {
    const name = 'lora_te2_text_projection';
    const lora = await openLayer({
      [`${name}.lora_down.weight`]: floats([1, 2], [1, 2]),
      [`${name}.lora_up.weight`]: floats([2, 1], [3, 4]),
    });
    const [layer] = joinLoras([{ lora, strength: 1, clipStrength: 0.5 }]);
    expect(layer).toMatchObject({ part: 'clipG', weight: 'text_projection.weight', alpha: 1 });
    expect([...layer!.up.data]).toEqual([1.5, 2]);
  });

  it('refuses LoRAs for different models, and no change', async () => {
    const layer = (inputs: number, name: string) =>
      openLayer(
        {
          'lora_unet_context_embedder.lora_down.weight': randomFloats([2, inputs]),
          'lora_unet_context_embedder.lora_up.weight': randomFloats([4, 2]),
        },
        name,
      );
    const [medium, large] = [await layer(3, 'medium.safetensors'), await layer(5, 'large.safetensors')];
    const both = [medium, large].map((lora) => ({ lora, strength: 1 }));
    expect(() => joinLoras(both)).toThrow(
      /^medium\.safetensors and large\.safetensors are LoRAs for different models: they change "context_embedder\.weight" as \[4,3\] and \[4,5\]/,
    );
    expect(() => joinLoras([{ lora: medium, strength: 0 }])).toThrow(/change nothing/);
  });
});
