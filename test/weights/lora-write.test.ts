import { readFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { SD3_MEDIUM_TRANSFORMER, SD35_LARGE_TRANSFORMER, SD35_MEDIUM_TRANSFORMER } from '../../src/models/config.ts';
import { floats, type TensorData, toFloat32 } from '../../src/tensor/data.ts';
import { combineLoras, type Lora, openLora } from '../../src/weights/lora.ts';
import type { LoraPart } from '../../src/weights/lora-names.ts';
import {
  encodeFloats,
  LORA_FORMATS,
  type LoraFile,
  type LoraFileOptions,
  type LoraLayer,
  loraFile,
  loraLayers,
} from '../../src/weights/lora-write.ts';
import { serializeSafetensors } from '../../src/weights/safetensors.ts';
import { golden, maxDifference, readGolden } from '../support/golden.ts';
import { randomFloats } from '../support/run.ts';
import { bytesSource } from './sources.ts';

async function reopen({ tensors, metadata }: LoraFile, name = 'written.safetensors'): Promise<Lora> {
  return openLora(bytesSource(serializeSafetensors(tensors, metadata), name));
}

async function openGolden(name: string): Promise<Lora> {
  const path = new URL(`../golden/${name}.safetensors`, import.meta.url);
  return openLora(bytesSource(readFileSync(path), `${name}.safetensors`));
}

function product(a: TensorData, b: TensorData, factor = 1): Float64Array {
  const [rows, inner] = a.shape as [number, number];
  const columns = b.shape[1]!;
  const result = new Float64Array(rows * columns);
  for (let row = 0; row < rows; row++) {
    for (let i = 0; i < inner; i++) {
      for (let column = 0; column < columns; column++) {
        result[row * columns + column]! +=
          factor * Number(a.data[row * inner + i]) * Number(b.data[i * columns + column]);
      }
    }
  }
  return result;
}

/** Every change of a LoRA written out, by `part weight`, through the reader. */
function written(lora: Lora): Map<string, Float64Array> {
  const all = new Map<string, Float64Array>();
  for (const part of Object.keys(lora.parts) as LoraPart[]) {
    const shapes = new Map(
      [...lora.parts[part]!].map(([weight, [change]]) => [weight, [change!.outputs, change!.down.shape[1]!]]),
    );
    for (const [weight, { up, down }] of combineLoras([{ lora, strength: 1 }], part, shapes)) {
      all.set(`${part} ${weight}`, product(up, down));
    }
  }
  return all;
}

function expectEqual(
  actual: ReadonlyMap<string, Float64Array>,
  expected: ReadonlyMap<string, Float64Array>,
  tolerance: number,
): void {
  expect([...actual.keys()].sort()).toEqual([...expected.keys()].sort());
  for (const [name, values] of expected) expect(maxDifference(actual.get(name)!, values), name).toBeLessThan(tolerance);
}

/** A layer of random values; alpha 3 at rank 2 is no factor that hides. */
function layer(weight: string, outputs: number, inputs: number, part: LoraPart = 'transformer', rank = 2): LoraLayer {
  const seed = weight.length + outputs;
  return {
    part,
    weight,
    down: randomFloats([rank, inputs], seed),
    up: randomFloats([outputs, rank], seed + 1),
    alpha: 3,
  };
}

/** Every kind of layer of all four networks; block 5 is the context's last, with shift and scale only. */
const everything: LoraLayer[] = [
  layer('x_embedder.proj.weight', 6, 16),
  layer('t_embedder.mlp.0.weight', 6, 4),
  layer('t_embedder.mlp.2.weight', 6, 6),
  layer('y_embedder.mlp.0.weight', 6, 5),
  layer('y_embedder.mlp.2.weight', 6, 6),
  layer('context_embedder.weight', 6, 7),
  layer('joint_blocks.0.x_block.adaLN_modulation.1.weight', 54, 6),
  layer('joint_blocks.0.x_block.attn.qkv.weight', 18, 6),
  layer('joint_blocks.0.x_block.attn.proj.weight', 6, 6),
  layer('joint_blocks.0.x_block.attn2.qkv.weight', 18, 6),
  layer('joint_blocks.0.x_block.attn2.proj.weight', 6, 6),
  layer('joint_blocks.11.x_block.mlp.fc1.weight', 24, 6),
  layer('joint_blocks.11.x_block.mlp.fc2.weight', 6, 24),
  layer('joint_blocks.0.context_block.adaLN_modulation.1.weight', 36, 6),
  layer('joint_blocks.5.context_block.adaLN_modulation.1.weight', 12, 6),
  layer('joint_blocks.5.context_block.attn.qkv.weight', 18, 6),
  layer('joint_blocks.0.context_block.attn.proj.weight', 6, 6),
  layer('joint_blocks.0.context_block.mlp.fc1.weight', 24, 6),
  layer('joint_blocks.0.context_block.mlp.fc2.weight', 6, 24),
  layer('final_layer.adaLN_modulation.1.weight', 12, 6),
  layer('final_layer.linear.weight', 8, 6),
  layer('text_model.encoder.layers.3.self_attn.q_proj.weight', 5, 5, 'clipL'),
  layer('text_model.encoder.layers.0.mlp.fc2.weight', 5, 9, 'clipL'),
  layer('text_model.encoder.layers.31.self_attn.out_proj.weight', 7, 7, 'clipG'),
  layer('text_projection.weight', 7, 7, 'clipG'),
  layer('encoder.block.23.layer.0.SelfAttention.q.weight', 8, 6, 't5'),
  layer('encoder.block.0.layer.1.DenseReluDense.wi_0.weight', 9, 6, 't5'),
];
const expected = new Map(
  everything.map(({ part, weight, up, down, alpha }) => [`${part} ${weight}`, product(up, down, alpha / 2)]),
);

describe.each(LORA_FORMATS)('a LoRA of every layer in the layout of %s', (format) => {
  it('is read as the same changes', async () => {
    const lora = await reopen(loraFile(everything, { format, dtype: 'float32' }));
    expect(lora.unused).toEqual([]);
    expectEqual(written(lora), expected, 2e-6);
  });

  it.each([
    ['float16', 3e-3],
    ['bfloat16', 3e-2],
  ] as const)('is read as the same changes from %s', async (dtype, tolerance) => {
    const file = loraFile(everything, { format, dtype });
    const types = new Set([...file.tensors].filter(([name]) => !name.endsWith('.alpha')).map(([, t]) => t.dtype));
    expect([...types]).toEqual([dtype]);
    expectEqual(written(await reopen(file)), expected, tolerance);
  });

  it('comes back as the layers it was written from', async () => {
    const layers = loraLayers(await reopen(loraFile(everything, { format, dtype: 'float32' })));
    expect(layers.map(({ part, weight }) => `${part} ${weight}`).sort()).toEqual([...expected.keys()].sort());
    for (const { weight, part, up, down, alpha } of layers) {
      expect(down.shape[0], weight).toBe(2);
      expect(maxDifference(product(up, down, alpha / 2), expected.get(`${part} ${weight}`)!), weight).toBeLessThan(
        2e-6,
      );
    }
  });

  it('can be written in either layout again without a loss', async () => {
    const first = await reopen(loraFile(everything, { format, dtype: 'float32' }));
    for (const other of LORA_FORMATS) {
      const again = loraFile(loraLayers(first), { format: other, dtype: 'float32' });
      expect([...again.tensors.keys()].sort()).toEqual(
        [...loraFile(everything, { format: other }).tensors.keys()].sort(),
      );
      expectEqual(written(await reopen(again)), expected, 2e-6);
    }
  });
});

describe('the golden LoRAs', async () => {
  const files = { kohya: await openGolden('lora_kohya'), diffusers: await openGolden('lora_diffusers') };
  const tensors = { kohya: readGolden('lora_kohya'), diffusers: readGolden('lora_diffusers') };
  const changes = written(files.kohya);

  it.each([
    ['kohya', 'kohya'],
    ['kohya', 'diffusers'],
    ['diffusers', 'kohya'],
    ['diffusers', 'diffusers'],
  ] as const)('from %s have the names of the golden file in %s, and its changes', async (from, to) => {
    const file = loraFile(loraLayers(files[from]), { format: to });
    expect([...file.tensors.keys()].sort()).toEqual([...tensors[to].keys()].sort());
    for (const [name, { shape }] of tensors[to]) expect(file.tensors.get(name)!.shape, name).toEqual(shape);
    expectEqual(written(await reopen(file)), changes, 1e-7);
  });

  it('from kohya have the values of the golden file of diffusers, whose up matrices hold alpha / rank', () => {
    const file = loraFile(loraLayers(files.kohya), { format: 'diffusers' });
    for (const [name, tensor] of file.tensors) {
      expect(tensor.data, name).toEqual(golden(tensors.diffusers, name).data);
    }
  });

  it('keep values and alphas in their own layout', () => {
    const file = loraFile(loraLayers(files.kohya), { format: 'kohya' });
    for (const [name, tensor] of file.tensors) {
      expect([...toFloat32(tensor)], name).toEqual([...toFloat32(golden(tensors.kohya, name))]);
    }
    // The golden file has layers of another alpha, too.
    expect(file.metadata).toEqual({
      ss_network_module: 'networks.lora_sd3',
      ss_network_dim: '4',
      ss_network_alpha: 'Dynamic',
    });
  });
});

describe("kohya's layout", () => {
  it.each([
    ['transformer', 'joint_blocks.0.x_block.attn.qkv.weight', 'lora_unet_joint_blocks_0_x_block_attn_qkv'],
    ['transformer', 'final_layer.adaLN_modulation.1.weight', 'lora_unet_final_layer_adaLN_modulation_1'],
    ['clipL', 'text_model.encoder.layers.3.mlp.fc1.weight', 'lora_te1_text_model_encoder_layers_3_mlp_fc1'],
    ['clipG', 'text_projection.weight', 'lora_te2_text_projection'],
    ['t5', 'encoder.block.2.layer.0.SelfAttention.o.weight', 'lora_te3_encoder_block_2_layer_0_SelfAttention_o'],
  ] as const)('names %s %s as %s', (part, weight, name) => {
    const { tensors } = loraFile([layer(weight, 6, 6, part)], { format: 'kohya' });
    expect([...tensors.keys()]).toEqual([`${name}.lora_down.weight`, `${name}.lora_up.weight`, `${name}.alpha`]);
    expect(tensors.get(`${name}.alpha`)).toEqual(floats([], [3]));
  });

  it('has the patch embedding as convolutions', () => {
    const file = loraFile([layer('x_embedder.proj.weight', 6, 16)], { format: 'kohya', dtype: 'float32' });
    expect(file.tensors.get('lora_unet_x_embedder_proj.lora_down.weight')!.shape).toEqual([2, 4, 2, 2]);
    expect(file.tensors.get('lora_unet_x_embedder_proj.lora_up.weight')!.shape).toEqual([6, 2, 1, 1]);
  });

  it('tells ranks and alphas that differ as kohya does', () => {
    const mixed = [layer('context_embedder.weight', 6, 7), layer('final_layer.linear.weight', 8, 6, 'transformer', 3)];
    expect(loraFile(mixed, { format: 'kohya' }).metadata).toMatchObject({
      ss_network_dim: 'Dynamic',
      ss_network_alpha: '3',
    });
  });
});

describe("diffusers' layout", () => {
  const file = (layers: readonly LoraLayer[], options: Partial<LoraFileOptions> = {}) =>
    loraFile(layers, { format: 'diffusers', dtype: 'float32', ...options });
  const adapter = ({ metadata }: LoraFile) => JSON.parse(metadata.lora_adapter_metadata!);

  it('has one down matrix and a third of the rows for each of queries, keys and values', () => {
    const one = layer('joint_blocks.2.context_block.attn.qkv.weight', 6, 4);
    const { tensors } = file([{ ...one, alpha: 1 }]);
    const names = ['add_q_proj', 'add_k_proj', 'add_v_proj'].map(
      (name) => `transformer.transformer_blocks.2.attn.${name}`,
    );
    expect([...tensors.keys()]).toEqual(names.flatMap((name) => [`${name}.lora_A.weight`, `${name}.lora_B.weight`]));
    for (const [third, name] of names.entries()) {
      expect(tensors.get(`${name}.lora_A.weight`)).toEqual(one.down);
      const rows = one.up.data.subarray(third * 4, third * 4 + 4).map((value) => value / 2);
      expect(tensors.get(`${name}.lora_B.weight`)).toEqual(floats([2, 2], rows));
    }
  });

  it.each([
    ['final_layer.adaLN_modulation.1.weight', 8, 'norm_out.linear', true],
    ['joint_blocks.5.context_block.adaLN_modulation.1.weight', 8, 'transformer_blocks.5.norm1_context.linear', true],
    ['joint_blocks.4.context_block.adaLN_modulation.1.weight', 24, 'transformer_blocks.4.norm1_context.linear', false],
    ['joint_blocks.5.x_block.adaLN_modulation.1.weight', 24, 'transformer_blocks.5.norm1.linear', false],
  ])('has %s of %d rows as %s, halves exchanged: %s', (weight, outputs, name, exchanged) => {
    const one = { ...layer(weight, outputs, 4), alpha: 2 };
    const rows = [...one.up.data];
    const half = rows.length / 2;
    const { tensors } = file([one]);
    expect([...tensors.get(`transformer.${name}.lora_B.weight`)!.data]).toEqual(
      exchanged ? [...rows.slice(half), ...rows.slice(0, half)] : rows,
    );
  });

  it('tells PEFT the ranks, with alphas equal to them', () => {
    const mixed = [
      layer('context_embedder.weight', 6, 7),
      layer('joint_blocks.1.x_block.attn.proj.weight', 6, 6),
      layer('final_layer.linear.weight', 8, 6, 'transformer', 3),
      layer('text_model.encoder.layers.0.mlp.fc1.weight', 6, 6, 'clipL', 5),
    ];
    const written = file(mixed);
    expect(written.metadata.format).toBe('pt');
    expect(adapter(written)).toEqual({
      'transformer.r': 2,
      'transformer.lora_alpha': 2,
      'transformer.rank_pattern': { proj_out: 3 },
      'transformer.alpha_pattern': { proj_out: 3 },
      'transformer.target_modules': ['context_embedder', 'transformer_blocks.1.attn.to_out.0', 'proj_out'],
      'text_encoder.r': 5,
      'text_encoder.lora_alpha': 5,
      'text_encoder.rank_pattern': {},
      'text_encoder.alpha_pattern': {},
      'text_encoder.target_modules': ['text_model.encoder.layers.0.mlp.fc1'],
    });
  });

  it('gives the same changes to readers that do not read the metadata', async () => {
    const { tensors } = file(everything);
    expectEqual(written(await reopen({ tensors, metadata: {} })), expected, 2e-6);
  });

  it('takes queries, keys and values apart that were joined of matrices of their own', async () => {
    const name = (third: string) => `transformer.transformer_blocks.0.attn.to_${third}`;
    const apart = new Map<string, TensorData>(
      [
        ['q', 2],
        ['v', 3],
      ].flatMap(([third, rank], i) => [
        [`${name(String(third))}.lora_A.weight`, randomFloats([Number(rank), 4], i + 1)] as const,
        [`${name(String(third))}.lora_B.weight`, randomFloats([4, Number(rank)], i + 5)] as const,
      ]),
    );
    const lora = await reopen({ tensors: apart, metadata: {} });
    const [joined, ...more] = loraLayers(lora);
    expect(more).toEqual([]);
    expect(joined).toMatchObject({ weight: 'joint_blocks.0.x_block.attn.qkv.weight', alpha: 5 });
    expect(joined!.down.shape).toEqual([5, 4]);
    expect(joined!.up.shape).toEqual([12, 5]);
    expectEqual(written(await reopen(loraFile([joined!], { format: 'kohya', dtype: 'float32' }))), written(lora), 1e-6);
    const again = file([joined!]);
    expect([...again.tensors.keys()].sort()).toEqual([...apart.keys()].sort());
    for (const [key, { data }] of apart) expect([...again.tensors.get(key)!.data], key).toEqual([...data]);
  });

  it('keeps queries, keys and values of a LoRA that was not trained yet', () => {
    const one = layer('joint_blocks.0.x_block.attn.qkv.weight', 12, 4);
    const { tensors } = file([{ ...one, up: floats([12, 2], new Float32Array(24)) }]);
    expect(tensors.size).toBe(6);
  });

  it('joins thirds of different factors', async () => {
    const name = (third: string) => `transformer.transformer_blocks.0.attn.to_${third}`;
    const shared = randomFloats([2, 4], 1);
    const tensors = new Map<string, TensorData>(
      ['q', 'k', 'v'].flatMap((third, i) => [
        [`${name(third)}.lora_A.weight`, shared] as const,
        [`${name(third)}.lora_B.weight`, randomFloats([4, 2], i + 5)] as const,
        [`${name(third)}.alpha`, floats([], [i + 1])] as const,
      ]),
    );
    const lora = await reopen({ tensors, metadata: {} });
    const [joined] = loraLayers(lora);
    expect(joined!.down.shape).toEqual([2, 4]);
    expectEqual(written(await reopen(file([joined!]))), written(lora), 1e-6);
  });
});

describe('metadata', () => {
  it.each([
    [SD35_MEDIUM_TRANSFORMER, '3-5-medium', 'stable-diffusion-v3.5-medium/lora'],
    [SD35_LARGE_TRANSFORMER, '3-5-large', 'stable-diffusion-v3.5-large/lora'],
    [SD3_MEDIUM_TRANSFORMER, '3-medium', 'stable-diffusion-v3-medium/lora'],
  ])('names a released model', (transformer, version, architecture) => {
    const { metadata } = loraFile([layer('context_embedder.weight', 6, 7)], { format: 'kohya', transformer });
    expect(metadata).toMatchObject({ ss_base_model_version: version, 'modelspec.architecture': architecture });
  });

  it('names no model that is of another size', () => {
    const transformer = { ...SD35_MEDIUM_TRANSFORMER, depth: 3 };
    const { metadata } = loraFile([layer('context_embedder.weight', 6, 7)], { format: 'kohya', transformer });
    expect(Object.keys(metadata).sort()).toEqual(['ss_network_alpha', 'ss_network_dim', 'ss_network_module']);
  });

  it("keeps what is true still and replaces what described another file's tensors", () => {
    const metadata = {
      ss_output_name: 'style',
      'modelspec.title': 'Style',
      format: 'pt',
      lora_adapter_metadata: '{}',
      ss_network_dim: '64',
      sshs_model_hash: 'abc',
      'modelspec.hash_sha256': 'abc',
    };
    const one = [layer('context_embedder.weight', 6, 7)];
    expect(loraFile(one, { format: 'kohya', metadata }).metadata).toEqual({
      ss_output_name: 'style',
      'modelspec.title': 'Style',
      ss_network_module: 'networks.lora_sd3',
      ss_network_dim: '2',
      ss_network_alpha: '3',
    });
    const { lora_adapter_metadata: _, ...others } = loraFile(one, { format: 'diffusers', metadata }).metadata;
    expect(others).toEqual({ ss_output_name: 'style', 'modelspec.title': 'Style', format: 'pt' });
  });
});

describe('refused are', () => {
  const one = layer('context_embedder.weight', 6, 7);

  it.each([
    ['weights that no LoRA changes', layer('pos_embed.weight', 4, 4), /No layout.*"pos_embed\.weight" \(transformer\)/],
    ['biases', { ...one, weight: 'context_embedder.bias' }, /No layout/],
    ["other networks' weights", { ...one, part: 'clipL' }, /"context_embedder\.weight" \(clipL\)/],
  ] as const)('%s', (_, wrong, message) => {
    for (const format of LORA_FORMATS) {
      expect(() => loraFile([wrong], { format })).toThrow(message);
      expect(() => loraFile([wrong], { format })).toThrow(expect.objectContaining({ code: 'bad-option' }));
    }
  });

  it.each([
    ['queries, keys and values of uneven rows', layer('joint_blocks.0.x_block.attn.qkv.weight', 7, 4), /as \[7,4\]/],
    ['shift and scale of uneven rows', layer('final_layer.adaLN_modulation.1.weight', 7, 4), /as \[7,4\]/],
    ['patches of uneven size', layer('x_embedder.proj.weight', 6, 7), /as \[6,7\]/],
  ])('in the layout of diffusers %s', (_, wrong, message) => {
    expect(() => loraFile([wrong], { format: 'diffusers' })).toThrow(message);
  });

  it('values that the element type cannot hold', () => {
    const large = { ...one, up: floats([6, 2], new Float32Array(12).fill(70_000)) };
    expect(() => loraFile([large], { format: 'kohya' })).toThrow(
      /lora_up\.weight" gets values that float16 cannot hold/,
    );
    expect(() => loraFile([large], { format: 'kohya', dtype: 'bfloat16' })).not.toThrow();
    const broken = { ...one, up: floats([6, 2], new Float32Array(12).fill(Number.NaN)) };
    for (const dtype of ['float16', 'bfloat16', 'float32'] as const) {
      expect(() => loraFile([broken], { format: 'kohya', dtype })).toThrow(
        expect.objectContaining({ code: 'bad-option' }),
      );
    }
  });

  it('no layers, two layers of one weight, and matrices that do not fit each other', () => {
    expect(() => loraFile([], { format: 'kohya' })).toThrow(RangeError);
    expect(() => loraFile([one, one], { format: 'kohya' })).toThrow(/two LoRA layers/);
    expect(() => loraFile([{ ...one, up: floats([6, 1], new Float32Array(6)) }], { format: 'kohya' })).toThrow(
      RangeError,
    );
    expect(() => loraFile([{ ...one, alpha: Number.NaN }], { format: 'kohya' })).toThrow(RangeError);
  });

  it('files whose queries and keys are of different sizes', async () => {
    const name = 'transformer.transformer_blocks.0.attn.to_';
    const lora = await reopen({
      tensors: new Map(
        [4, 5].flatMap((inputs, i) => [
          [`${name}${'qk'[i]}.lora_A.weight`, randomFloats([2, inputs])] as const,
          [`${name}${'qk'[i]}.lora_B.weight`, randomFloats([4, 2])] as const,
        ]),
      ),
      metadata: {},
    });
    expect(() => loraLayers(lora)).toThrow(/written\.safetensors are of different sizes/);
    expect(() => loraLayers(lora)).toThrow(expect.objectContaining({ code: 'bad-file' }));
  });
});

it('bfloat16 rounds to the nearest, to even where two are equally near', () => {
  // 1 + k / 128 are neighbours; results by torch.tensor(...).bfloat16().
  const values = [1, 1.00390625, 1.01171875, 1.004, -1.00390625, 0.1, 1e-40, 3.38e38];
  const bits = [0x3f80, 0x3f80, 0x3f82, 0x3f81, 0xbf80, 0x3dcd, 0x0001, 0x7f7e];
  expect([...encodeFloats('x', floats([values.length], values), 'bfloat16').data]).toEqual(bits);
});
