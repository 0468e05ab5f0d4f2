import { readFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { SD3_MEDIUM_TRANSFORMER, SD35_LARGE_TRANSFORMER, SD35_MEDIUM_TRANSFORMER } from '../../src/models/config.ts';
import { type FloatTensor, floats, type TensorData, toFloat16, toFloat32 } from '../../src/tensor/data.ts';
import { transformerTensors } from '../../src/weights/expected.ts';
import { type CombinedChange, combineLoras, type Lora, openLora } from '../../src/weights/lora.ts';
import { serializeSafetensors } from '../../src/weights/safetensors.ts';
import { golden, maxDifference, readGolden } from '../support/golden.ts';
import { randomFloats } from '../support/run.ts';
import { bytesSource } from './sources.ts';

const kohya = inFloat32(readGolden('lora_kohya'));
const diffusers = inFloat32(readGolden('lora_diffusers'));

/** As they are, in half precision. */
const kohyaLora = await openGolden('lora_kohya');
const diffusersLora = await openGolden('lora_diffusers');

/** Shapes of the golden model's transformer. */
const shapes = new Map(
  [...readGolden('tiny_sd35')]
    .filter(([name]) => name.startsWith('model.diffusion_model.'))
    .map(([name, { shape }]) => [name.replace('model.diffusion_model.', ''), shape]),
);

async function open(
  tensors: ReadonlyMap<string, TensorData> | Record<string, TensorData>,
  metadata: Record<string, string> = {},
  name = 'style.safetensors',
): Promise<Lora> {
  const map = new Map(tensors instanceof Map ? tensors : Object.entries(tensors));
  return openLora(bytesSource(serializeSafetensors(map, metadata), name));
}

async function openGolden(name: string): Promise<Lora> {
  const path = new URL(`../golden/${name}.safetensors`, import.meta.url);
  return openLora(bytesSource(readFileSync(path), `${name}.safetensors`));
}

function inFloat32(tensors: Map<string, TensorData>): Map<string, FloatTensor> {
  return new Map([...tensors].map(([name, tensor]) => [name, floats(tensor.shape, toFloat32(tensor))]));
}

/** The tensors of a file under other names. */
function renamed(tensors: Map<string, TensorData>, rename: (name: string) => string): Map<string, TensorData> {
  return new Map([...tensors].map(([name, tensor]) => [rename(name), tensor]));
}

/** `a @ b` of row-major matrices, in double precision. */
function product(a: Pick<TensorData, 'shape' | 'data'>, b: Pick<TensorData, 'shape' | 'data'>): Float64Array {
  const [rows, inner] = a.shape as [number, number];
  const columns = b.shape[1]!;
  const result = new Float64Array(rows * columns);
  for (let row = 0; row < rows; row++) {
    for (let i = 0; i < inner; i++) {
      const factor = Number(a.data[row * inner + i]);
      for (let column = 0; column < columns; column++) {
        result[row * columns + column]! += factor * Number(b.data[i * columns + column]);
      }
    }
  }
  return result;
}

/** Changes written out: each weight's `up @ down`. */
function written(changes: ReadonlyMap<string, CombinedChange>): Map<string, Float64Array> {
  return new Map([...changes].map(([name, { up, down }]) => [name, product(up, down)]));
}

/** `alpha / rank * up @ down` of every layer of the kohya file, worked out from its tensors alone. */
function kohyaChanges(): Map<string, Float64Array> {
  const changes = new Map<string, Float64Array>();
  for (const name of kohya.keys()) {
    const [, layer, block, stream, leaf] =
      /^(lora_unet_joint_blocks_(\d)_(x|context)_block_(\w+))\.alpha$/.exec(name) ?? [];
    if (!leaf) continue;
    const values = (end: string) => golden(kohya, `${layer}.${end}`);
    const down = values('lora_down.weight');
    const scale = Number(values('alpha').data[0]) / down.shape[0]!;
    const dotted = leaf.replace(/^(attn2?|mlp)_/, '$1.').replace('modulation_1', 'modulation.1');
    changes.set(
      `joint_blocks.${block}.${stream}_block.${dotted}.weight`,
      product(values('lora_up.weight'), down).map((value) => value * scale),
    );
  }
  return changes;
}

const expected = kohyaChanges();

function expectGolden(changes: ReadonlyMap<string, CombinedChange>, strength = 1): void {
  expect([...changes.keys()].sort()).toEqual([...expected.keys()].sort());
  for (const [name, values] of written(changes)) {
    const scaled = expected.get(name)!.map((value) => value * strength);
    expect(maxDifference(values, scaled), name).toBeLessThan(1e-7);
  }
}

/** That a file under other names gives the same matrices as under its own. */
async function expectEqual(file: Map<string, TensorData>, rename: (name: string) => string): Promise<void> {
  const names = renamed(file, rename);
  expect(names.size).toBe(file.size);
  const [own, other] = [await open(file), await open(names)];
  expect(other.unused).toEqual([]);
  const changes = combineLoras([{ lora: other, strength: 1 }], 'transformer', shapes);
  const reference = combineLoras([{ lora: own, strength: 1 }], 'transformer', shapes);
  expect([...changes.keys()].sort()).toEqual([...reference.keys()].sort());
  for (const [name, { up, down }] of reference) {
    expect(maxDifference(changes.get(name)!.up.data, up.data), name).toBe(0);
    expect(maxDifference(changes.get(name)!.down.data, down.data), name).toBe(0);
  }
}

/** A LoRA of a single layer, rank 2. */
function layer(name: string, outputs: number, inputs: number, seed = 1): Record<string, TensorData> {
  return {
    [`${name}.lora_down.weight`]: randomFloats([2, inputs], seed),
    [`${name}.lora_up.weight`]: randomFloats([outputs, 2], seed + 1),
  };
}

describe('the golden LoRA', () => {
  it.each([1, 0.5, -0.75])('in kohya layout is alpha / rank * up @ down of every layer (strength %d)', (strength) => {
    expect(kohyaLora.name).toBe('lora_kohya.safetensors');
    expect(kohyaLora.unused).toEqual([]);
    expect(Object.keys(kohyaLora.parts)).toEqual(['transformer']);
    expectGolden(combineLoras([{ lora: kohyaLora, strength }], 'transformer', shapes), strength);
  });

  it('is the same in diffusers layout', () => {
    expect(diffusersLora.unused).toEqual([]);
    expectGolden(combineLoras([{ lora: diffusersLora, strength: 1 }], 'transformer', shapes));
  });

  it('changes a third of the rows for each of queries, keys and values', () => {
    const weight = 'joint_blocks.0.x_block.attn.qkv.weight';
    const thirds = diffusersLora.parts.transformer!.get(weight)!;
    expect(thirds.map(({ rows }) => rows)).toEqual([
      [0, 128],
      [128, 256],
      [256, 384],
    ]);
    const { up, down } = combineLoras([{ lora: diffusersLora, strength: 1 }], 'transformer', shapes).get(weight)!;
    expect(up.shape).toEqual([384, 12]);
    expect(down.shape).toEqual([12, 128]);
  });

  const dots = (name: string) =>
    name
      .replace(/^lora_unet_joint_blocks_(\d)_(x_block|context_block)_/, 'joint_blocks.$1.$2.')
      .replace(/\.(attn2?|mlp)_/, '.$1.')
      .replace('modulation_1', 'modulation.1');
  const kohyaAliases: Record<string, (name: string) => string> = {
    'ComfyUI, lora_down': (name) => `diffusion_model.${dots(name)}`,
    'ComfyUI, lora_A': (name) =>
      `diffusion_model.${dots(name)}`.replace('lora_down', 'lora_A').replace('lora_up', 'lora_B'),
    'the official checkpoint': (name) => `model.diffusion_model.${dots(name)}`,
    'no prefix': dots,
  };
  for (const [layout, rename] of Object.entries(kohyaAliases)) {
    it(`is the same in the names of ${layout}`, () => expectEqual(kohya, rename));
  }

  const downUp = (name: string, down: string, up: string) =>
    name.replace('.lora_A.weight', down).replace('.lora_B.weight', up);
  const underscored = (name: string, prefix: string) => {
    const bare = name.replace('transformer.', '').replace(/\.lora_[AB]\.weight$/, '');
    return prefix + bare.replaceAll('.', '_') + name.slice(name.length - '.lora_A.weight'.length);
  };
  const diffusersAliases: Record<string, (name: string) => string> = {
    PEFT: (name) => name.replace('transformer.', 'base_model.model.'),
    'PEFT, with a prefix': (name) => name.replace('transformer.', 'transformer.base_model.model.'),
    "PEFT, with an adapter's name": (name) => downUp(name, '.lora_A.default.weight', '.lora_B.default.weight'),
    OneTrainer: (name) => downUp(underscored(name, 'lora_transformer_'), '.lora_down.weight', '.lora_up.weight'),
    SimpleTuner: (name) => downUp(underscored(name, 'lycoris_'), '.lora_down.weight', '.lora_up.weight'),
    'diffusers, lora.down': (name) => downUp(name, '.lora.down.weight', '.lora.up.weight'),
    'diffusers, _lora.down': (name) => downUp(name, '_lora.down.weight', '_lora.up.weight'),
    'diffusers, lora_linear_layer': (name) =>
      downUp(name, '.lora_linear_layer.down.weight', '.lora_linear_layer.up.weight'),
    'no prefix': (name) => name.replace('transformer.', ''),
  };
  for (const [layout, rename] of Object.entries(diffusersAliases)) {
    it(`is the same in diffusers' names in the way of ${layout}`, () => expectEqual(diffusers, rename));
  }
});

describe('strengths', () => {
  it('of 0 change nothing', () => {
    expect(combineLoras([{ lora: kohyaLora, strength: 0 }], 'transformer', shapes).size).toBe(0);
    expect(combineLoras([], 'transformer', shapes).size).toBe(0);
  });

  it('add up over several LoRAs', () => {
    const loras = [
      { lora: kohyaLora, strength: 1.5 },
      { lora: diffusersLora, strength: -0.25 },
      { lora: kohyaLora, strength: 0 },
    ];
    const combined = combineLoras(loras, 'transformer', shapes);
    expectGolden(combined, 1.25);
    // Rank 4 from the fused layer and three times 4 from the thirds.
    expect(combined.get('joint_blocks.0.x_block.attn.qkv.weight')!.down.shape).toEqual([16, 128]);
  });

  it('are apart for the text encoders, and the same where not given', async () => {
    const name = 'text_model.encoder.layers.0.mlp.fc1.weight';
    const tensors = layer('lora_te1_text_model_encoder_layers_0_mlp_fc1', 6, 4);
    const lora = await open({ ...tensors, ...layer('lora_unet_context_embedder', 6, 4) });
    const [down, up] = Object.values(tensors) as [TensorData, TensorData];
    const full = product(up, down);
    const change = (strength: number, clipStrength?: number) => {
      const use = { lora, strength, ...(clipStrength !== undefined && { clipStrength }) };
      return written(combineLoras([use], 'clipL', new Map([[name, [6, 4]]]))).get(name);
    };
    expect(
      maxDifference(
        change(1, 0.25)!,
        full.map((value) => value * 0.25),
      ),
    ).toBeLessThan(1e-7);
    expect(
      maxDifference(
        change(0.5)!,
        full.map((value) => value * 0.5),
      ),
    ).toBeLessThan(1e-7);
    expect(change(1, 0)).toBeUndefined();
    const transformer = combineLoras(
      [{ lora, strength: 0, clipStrength: 1 }],
      'transformer',
      new Map([['context_embedder.weight', [6, 4]]]),
    );
    expect(transformer.size).toBe(0);
  });

  it.each([Number.NaN, Number.POSITIVE_INFINITY, 100.5, -101])('refuses %d', (strength) => {
    const lora = kohyaLora;
    const message = /strength of lora_kohya\.safetensors is .*; give a number from -100 to 100/;
    expect(() => combineLoras([{ lora, strength }], 'transformer', shapes)).toThrow(message);
    expect(() => combineLoras([{ lora, strength: 1, clipStrength: strength }], 'transformer', shapes)).toThrow(message);
  });
});

describe('layers', () => {
  it.each([
    [
      'lora_te1_text_model_encoder_layers_11_self_attn_out_proj',
      'clipL',
      'text_model.encoder.layers.11.self_attn.out_proj.weight',
    ],
    [
      'text_encoder.text_model.encoder.layers.0.self_attn.q_proj',
      'clipL',
      'text_model.encoder.layers.0.self_attn.q_proj.weight',
    ],
    [
      'text_encoders.clip_l.transformer.text_model.encoder.layers.3.mlp.fc2',
      'clipL',
      'text_model.encoder.layers.3.mlp.fc2.weight',
    ],
    ['lora_te2_text_model_encoder_layers_31_mlp_fc1', 'clipG', 'text_model.encoder.layers.31.mlp.fc1.weight'],
    [
      'text_encoder_2.text_model.encoder.layers.2.self_attn.k_proj',
      'clipG',
      'text_model.encoder.layers.2.self_attn.k_proj.weight',
    ],
    ['text_encoder_2.text_projection', 'clipG', 'text_projection.weight'],
    ['lora_te3_encoder_block_0_layer_0_SelfAttention_o', 't5', 'encoder.block.0.layer.0.SelfAttention.o.weight'],
    [
      'text_encoder_3.encoder.block.23.layer.1.DenseReluDense.wi_0',
      't5',
      'encoder.block.23.layer.1.DenseReluDense.wi_0.weight',
    ],
    ['lora_unet_final_layer_linear', 'transformer', 'final_layer.linear.weight'],
    ['lora_unet_t_embedder_mlp_2', 'transformer', 't_embedder.mlp.2.weight'],
    ['transformer.time_text_embed.text_embedder.linear_1', 'transformer', 'y_embedder.mlp.0.weight'],
    ['transformer.proj_out', 'transformer', 'final_layer.linear.weight'],
    ['transformer.context_embedder', 'transformer', 'context_embedder.weight'],
    ['transformer.transformer_blocks.7.ff_context.net.2', 'transformer', 'joint_blocks.7.context_block.mlp.fc2.weight'],
    ['transformer.transformer_blocks.12.attn2.to_out.0', 'transformer', 'joint_blocks.12.x_block.attn2.proj.weight'],
  ] as const)('%s is of %s', async (name, part, weight) => {
    const tensors = layer(name, 6, 4);
    const lora = await open(tensors);
    expect(Object.keys(lora.parts)).toEqual([part]);
    const [down, up] = Object.values(tensors) as [TensorData, TensorData];
    const changes = written(combineLoras([{ lora, strength: 1 }], part, new Map([[weight, [6, 4]]])));
    expect(maxDifference(changes.get(weight)!, product(up, down))).toBe(0);
  });

  it.each([
    ['transformer.norm_out.linear', 'final_layer.adaLN_modulation.1.weight', 8, true],
    ['lora_transformer_norm_out_linear', 'final_layer.adaLN_modulation.1.weight', 8, true],
    ['lora_unet_final_layer_adaLN_modulation_1', 'final_layer.adaLN_modulation.1.weight', 8, false],
    // The last block's context has shift and scale only, the others six parts.
    [
      'transformer.transformer_blocks.5.norm1_context.linear',
      'joint_blocks.5.context_block.adaLN_modulation.1.weight',
      8,
      true,
    ],
    [
      'transformer.transformer_blocks.5.norm1_context.linear',
      'joint_blocks.5.context_block.adaLN_modulation.1.weight',
      24,
      false,
    ],
    [
      'lora_unet_joint_blocks_5_context_block_adaLN_modulation_1',
      'joint_blocks.5.context_block.adaLN_modulation.1.weight',
      8,
      false,
    ],
  ] as const)('%s changes %s of %d rows, halves exchanged: %s', async (name, weight, outputs, exchanged) => {
    const inputs = 4;
    const tensors = layer(name, outputs, inputs);
    const [down, up] = Object.values(tensors) as [TensorData, TensorData];
    const plain = product(up, down);
    const half = plain.length / 2;
    const expected = exchanged ? [...plain.subarray(half), ...plain.subarray(0, half)] : plain;
    const lora = await open(tensors);
    const changes = written(
      combineLoras([{ lora, strength: 1 }], 'transformer', new Map([[weight, [outputs, inputs]]])),
    );
    expect(maxDifference(changes.get(weight)!, expected)).toBe(0);
  });

  it("of the patch embedding's convolution are matrices of channels and places", async () => {
    const down = randomFloats([3, 16, 2, 2], 1);
    const up = randomFloats([128, 3, 1, 1], 2);
    const lora = await open({
      'lora_unet_x_embedder_proj.lora_down.weight': down,
      'lora_unet_x_embedder_proj.lora_up.weight': up,
    });
    const changes = combineLoras([{ lora, strength: 1 }], 'transformer', shapes);
    const { up: joinedUp, down: joinedDown } = changes.get('x_embedder.proj.weight')!;
    expect(joinedDown.shape).toEqual([3, 64]);
    expect(joinedUp.shape).toEqual([128, 3]);
    expect(joinedDown.data).toEqual(down.data);
    expect(joinedUp.data).toEqual(up.data);
  });

  it.each(['float16', 'bfloat16', 'float8e4m3'] as const)('are read from %s', async (dtype) => {
    // 1.5, -2 and 0.25 as bits of each type.
    const bits = {
      float16: Uint16Array.of(...toFloat16(Float32Array.of(1.5, -2, 0.25))),
      bfloat16: Uint16Array.of(0x3fc0, 0xc000, 0x3e80),
      float8e4m3: Uint8Array.of(0x3c, 0xc0, 0x28),
    }[dtype];
    const lora = await open({
      'lora_unet_context_embedder.lora_down.weight': { dtype, shape: [1, 3], data: bits },
      'lora_unet_context_embedder.lora_up.weight': { dtype, shape: [3, 1], data: bits },
    });
    const [change] = lora.parts.transformer!.get('context_embedder.weight')!;
    expect([...change!.down.data]).toEqual([1.5, -2, 0.25]);
    expect([...change!.up.data]).toEqual([1.5, -2, 0.25]);
  });
});

describe('alpha', () => {
  const name = 'transformer.transformer_blocks.1.attn.to_out.0';
  const scaleOf = async (tensors: Record<string, TensorData>, adapter?: unknown) => {
    const text = typeof adapter === 'string' ? adapter : JSON.stringify(adapter);
    const lora = await open(
      { ...layer(name, 6, 4), ...tensors },
      adapter === undefined ? {} : { lora_adapter_metadata: text },
    );
    return lora.parts.transformer!.get('joint_blocks.1.x_block.attn.proj.weight')![0]!.scale;
  };

  it('is the rank where nothing tells it', async () => {
    expect(await scaleOf({})).toBe(1);
    expect(await scaleOf({}, { 'text_encoder.lora_alpha': 8, 'text_encoder.r': 4 })).toBe(1);
  });

  it('comes from a tensor, of one value in any shape', async () => {
    expect(await scaleOf({ [`${name}.alpha`]: floats([], [1]) })).toBe(0.5);
    expect(await scaleOf({ [`${name}.alpha`]: floats([1, 1], [3]) })).toBe(1.5);
    const whole = { dtype: 'int64', shape: [1], data: BigInt64Array.of(4n) } as const;
    expect(await scaleOf({ [`${name}.alpha`]: whole })).toBe(2);
    expect(await scaleOf({ [`${name}.alpha`]: floats([], [1]) }, { 'transformer.lora_alpha': 8 })).toBe(0.5);
  });

  it("comes from diffusers' metadata", async () => {
    const general = { 'transformer.r': 2, 'transformer.lora_alpha': 8, 'transformer.target_modules': ['to_q'] };
    expect(await scaleOf({}, general)).toBe(4);
    expect(await scaleOf({}, { ...general, 'transformer.use_rslora': true })).toBeCloseTo(8 / Math.SQRT2, 12);
    const patterns = { 'attn.to_out.0': 3, 'attn.to_q': 5 };
    expect(await scaleOf({}, { ...general, 'transformer.alpha_pattern': patterns })).toBe(1.5);
    expect(
      await scaleOf(
        {},
        { ...general, 'transformer.alpha_pattern': { '^transformer_blocks\\.1\\.attn\\.to_out\\.0$': 6 } },
      ),
    ).toBe(3);
    // Not the end of a part of the name.
    expect(await scaleOf({}, { ...general, 'transformer.alpha_pattern': { 'out.0': 3 } })).toBe(4);
  });

  it.each([
    ['{', /lora_adapter_metadata of style\.safetensors is not JSON/],
    ['[1]', /is not a JSON object/],
    [{ 'transformer.lora_alpha': 'eight' }, /is wrong at transformer\.lora_alpha/],
    [
      { 'transformer.lora_alpha': 1, 'transformer.alpha_pattern': { x: null } },
      /is wrong at transformer\.alpha_pattern\.x/,
    ],
    [{ 'transformer.lora_alpha': 1, 'transformer.alpha_pattern': { '(a+)+': 1 } }, /regular expression "\(a\+\)\+"/],
  ])('in metadata like %j is refused', async (adapter, message) => {
    await expect(scaleOf({}, adapter)).rejects.toThrow(message);
    await expect(scaleOf({}, adapter)).rejects.toMatchObject({ code: 'bad-file' });
  });

  it.each([
    [floats([2], [1, 1]), /alpha" of style\.safetensors is of shape \[2\]/],
    [floats([], [Number.NaN]), /not finite/],
  ])('that is no number is refused', async (tensor, message) => {
    await expect(scaleOf({ [`${name}.alpha`]: tensor })).rejects.toThrow(message);
  });
});

describe('a LoRA that does not fit the model', () => {
  it.each([
    [
      'a wider model',
      'lora_unet_joint_blocks_0_x_block_attn_qkv',
      SD35_LARGE_TRANSFORMER.hiddenSize * 3,
      SD35_LARGE_TRANSFORMER.hiddenSize,
      /^large\.safetensors does not fit this model: it changes "joint_blocks\.0\.x_block\.attn\.qkv\.weight" as \[7296,2432\], but in the transformer it is \[4608,1536\]; use a LoRA made for this model\.$/,
    ],
    [
      'a third of a wider model',
      'transformer.transformer_blocks.0.attn.to_q',
      2432,
      1536,
      /as \[7296,1536\], but in the transformer it is \[4608,1536\]/,
    ],
    [
      'a deeper model',
      'lora_unet_joint_blocks_30_x_block_attn_proj',
      1536,
      1536,
      /"joint_blocks\.30\.x_block\.attn\.proj\.weight" as \[1536,1536\], which the transformer does not have/,
    ],
    [
      'other convolutions',
      'lora_unet_x_embedder_proj',
      1536,
      16,
      /as \[1536,16\], but in the transformer it is \[1536,64\]/,
    ],
  ])('of %s is refused with what was found and expected', async (_, name, outputs, inputs, message) => {
    const lora = await open(layer(name, outputs, inputs), {}, 'large.safetensors');
    const medium = transformerTensors(SD35_MEDIUM_TRANSFORMER);
    for (const strength of [1, 0]) {
      expect(() => combineLoras([{ lora, strength }], 'transformer', medium)).toThrow(message);
    }
    expect(() => combineLoras([{ lora, strength: 1 }], 'transformer', medium)).toThrow(
      expect.objectContaining({ code: 'bad-option' }),
    );
  });

  it('of SD3.5 is refused by SD3, which has no second attention', async () => {
    const lora = await open(layer('transformer.transformer_blocks.0.attn2.to_out.0', 1536, 1536));
    const use = [{ lora, strength: 1 }];
    expect(() => combineLoras(use, 'transformer', transformerTensors(SD35_MEDIUM_TRANSFORMER))).not.toThrow();
    expect(() => combineLoras(use, 'transformer', transformerTensors(SD3_MEDIUM_TRANSFORMER))).toThrow(
      /attn2\.proj\.weight".*which the transformer does not have/,
    );
  });
});

describe('a file that cannot be used', () => {
  const tensor = floats([2, 2], [1, 2, 3, 4]);

  it.each([
    [
      'SDXL by kohya',
      'lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight',
      /is a LoRA for Stable Diffusion XL \(it holds "lora_unet_input_blocks_4_1/,
    ],
    [
      'SD 1 by kohya',
      'lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k.lora_up.weight',
      /for Stable Diffusion 1, 2 or XL/,
    ],
    [
      'SDXL by diffusers',
      'unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight',
      /for Stable Diffusion 1, 2 or XL/,
    ],
    ['FLUX by kohya', 'lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight', /for FLUX/],
    [
      'FLUX by diffusers',
      'transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight',
      /for FLUX.*use one for Stable Diffusion 3\.5/,
    ],
  ])('is refused as a LoRA for another model: %s', async (_, name, message) => {
    await expect(open({ [name]: tensor })).rejects.toThrow(message);
    // FLUX shares some of its layers' names with Stable Diffusion 3, and SDXL the text encoders.
    const mixed = {
      ...layer('transformer.transformer_blocks.0.attn.to_q', 4, 4),
      ...layer('lora_te1_text_model_encoder_layers_0_mlp_fc1', 4, 4),
      [name]: tensor,
    };
    await expect(open(mixed)).rejects.toThrow(message);
    await expect(open(mixed)).rejects.toMatchObject({ code: 'unsupported-model' });
  });

  it.each([
    ['DoRA', 'lora_unet_joint_blocks_0_x_block_attn_qkv.dora_scale'],
    ['DoRA', 'transformer.transformer_blocks.0.attn.to_q.lora_magnitude_vector'],
    ['LoHa', 'lora_unet_joint_blocks_0_x_block_attn_qkv.hada_w1_a'],
    ['LoKr', 'lycoris_transformer_blocks_0_attn_to_q.lokr_w1'],
    ['LoCon in Tucker form', 'lora_unet_x_embedder_proj.lora_mid.weight'],
  ])('is refused as %s (%s)', async (kind, name) => {
    const file = { ...layer('lora_unet_joint_blocks_0_x_block_attn_qkv', 6, 2), [name]: tensor };
    await expect(open(file)).rejects.toThrow(
      `is of the kind ${kind} (it holds "${name}"), which this version does not read`,
    );
    await expect(open(file)).rejects.toMatchObject({ code: 'unsupported-model' });
  });

  it.each([
    ['no tensors', {}, /holds no LoRA for Stable Diffusion 3 \(it holds no tensors\)/],
    [
      'a checkpoint',
      { 'model.diffusion_model.joint_blocks.0.x_block.attn.proj.weight': tensor },
      /names like "model\.diffusion_model/,
    ],
    ['other layers', layer('lora_unet_blocks_0_self_attn_q', 2, 2), /names like "lora_unet_blocks_0_self_attn_q/],
    ['only an alpha', { 'lora_unet_context_embedder.alpha': floats([], [1]) }, /holds no LoRA/],
  ])('is refused where it has %s', async (_, tensors, message) => {
    await expect(open(tensors)).rejects.toThrow(message);
    await expect(open(tensors)).rejects.toMatchObject({ code: 'unsupported-model' });
  });

  const bare = 'lora_unet_context_embedder';
  const { [`${bare}.lora_down.weight`]: down, [`${bare}.lora_up.weight`]: up } = layer(bare, 6, 4);
  const whole = { dtype: 'int8', shape: [2, 4], data: new Int8Array(8) } as const;
  it.each([
    [
      'a lone half',
      { [`${bare}.lora_down.weight`]: down! },
      /holds "lora_unet_context_embedder\.lora_down\.weight" without the up matrix/,
    ],
    ['the other half', { [`${bare}.lora_up.weight`]: up! }, /without the down matrix/],
    [
      'matrices of different ranks',
      { ...layer(bare, 6, 4), [`${bare}.lora_up.weight`]: floats([6, 3], new Float32Array(18)) },
      /do not fit each other: \[6,3\] and \[2,4\]/,
    ],
    [
      'values that are not finite',
      { ...layer(bare, 6, 4), [`${bare}.lora_up.weight`]: floats([6, 2], new Float32Array(12).fill(Number.NaN)) },
      /not finite/,
    ],
    [
      'whole numbers',
      { ...layer(bare, 6, 4), [`${bare}.lora_down.weight`]: whole },
      /is int8 \[2,4\], not a matrix of a LoRA/,
    ],
    [
      'a vector',
      { ...layer(bare, 6, 4), [`${bare}.lora_down.weight`]: floats([2], [1, 1]) },
      /is float32 \[2\], not a matrix/,
    ],
    [
      'an empty matrix',
      { [`${bare}.lora_down.weight`]: floats([0, 4], []), [`${bare}.lora_up.weight`]: floats([6, 0], []) },
      /\[0,4\], not a matrix/,
    ],
    [
      'one layer in two layouts',
      { ...layer(bare, 6, 4), ...layer('transformer.context_embedder', 6, 4) },
      /changes "context_embedder\.weight" twice, the second time as "transformer\.context_embedder"/,
    ],
    [
      'the whole and a third of a layer',
      {
        ...layer('transformer.transformer_blocks.0.attn.to_k', 2, 2),
        ...layer('lora_unet_joint_blocks_0_x_block_attn_qkv', 6, 2),
      },
      /twice/,
    ],
    ['one matrix under two names', { ...layer(bare, 6, 4), [`${bare}.lora_A.weight`]: down! }, /holds both/],
  ])('is refused as damaged where it has %s', async (_, tensors, message) => {
    await expect(open(tensors)).rejects.toThrow(message);
    await expect(open(tensors)).rejects.toMatchObject({ code: 'bad-file' });
  });
});

it('names the tensors it does not use', async () => {
  const lora = await open({
    ...layer('lora_unet_context_embedder', 6, 4),
    'lora_unet_final_layer_linear.alpha': floats([], [1]),
    'lora_unet_joint_blocks_0_x_block_attn_ln_q.diff': floats([4], [1, 2, 3, 4]),
    'text_encoder.text_projection.lora_A.weight': floats([1, 1], [1]),
  });
  expect([...lora.unused].sort()).toEqual([
    'lora_unet_final_layer_linear.alpha',
    'lora_unet_joint_blocks_0_x_block_attn_ln_q.diff',
    'text_encoder.text_projection.lora_A.weight',
  ]);
  expect(Object.keys(lora.parts)).toEqual(['transformer']);
});
