import { readFile } from 'node:fs/promises';
import { beforeAll, describe, expect, test } from 'vitest';
import { MmditxError } from '../../src/errors.ts';
import {
  CLIP_G,
  CLIP_L,
  type ClipConfig,
  SD3_MEDIUM_TRANSFORMER,
  SD3_VAE,
  SD35_LARGE_TRANSFORMER,
  SD35_MEDIUM_TRANSFORMER,
  T5_XXL,
  type T5Config,
  type TransformerConfig,
  type VaeConfig,
} from '../../src/models/config.ts';
import { floats, toFloat32 } from '../../src/tensor/data.ts';
import { openCheckpoint } from '../../src/weights/checkpoint.ts';
import { clipTensors, t5Tensors, transformerTensors, vaeTensors } from '../../src/weights/expected.ts';
import { type ByteSource, openSafetensors } from '../../src/weights/safetensors.ts';
import { readWeight } from '../../src/weights/stored.ts';
import { bytesSource, headerOf, prefixed, rawSafetensors, shapesSource, tensorsSource } from './sources.ts';

const read = (name: string) => readFile(new URL(`../golden/${name}`, import.meta.url));
let tiny: Uint8Array;
let trainModel: Uint8Array;
beforeAll(async () => {
  [tiny, trainModel] = await Promise.all([read('tiny_sd35.safetensors'), read('train_model.safetensors')]);
});

const transformerPrefix = 'model.diffusion_model.';
const vaePrefix = 'first_stage_model.';
const released = {
  transformer: prefixed(transformerPrefix, transformerTensors(SD35_MEDIUM_TRANSFORMER)),
  vae: prefixed(vaePrefix, vaeTensors(SD3_VAE)),
  clipL: clipTensors(CLIP_L),
  clipG: clipTensors(CLIP_G),
  t5: t5Tensors(T5_XXL),
};
const join = (...maps: ReadonlyMap<string, readonly number[]>[]) => new Map(maps.flatMap((map) => [...map]));

async function refusal(...sources: ByteSource[]): Promise<MmditxError> {
  const error = await openCheckpoint(sources).then(
    () => undefined,
    (caught) => caught,
  );
  expect(error).toBeInstanceOf(MmditxError);
  expect(error.message).toMatch(/^[^\n]+\.$/);
  return error;
}

describe('the reference models', () => {
  test('all five networks of one file, with the configurations they were made with', async () => {
    const { parts, tokenizers } = await openCheckpoint([bytesSource(tiny, 'tiny.safetensors')]);
    expect(parts.transformer?.config).toEqual({
      hiddenSize: 128,
      depth: 4,
      heads: 2,
      headDim: 64,
      mlpHidden: 512,
      patchSize: 2,
      inChannels: 16,
      outChannels: 16,
      contextWidth: 96,
      pooledWidth: 80,
      timestepWidth: 256,
      tableSize: 24,
      dualAttentionLayers: [0, 1],
      qkNorm: true,
    } satisfies TransformerConfig);
    expect(parts.vae?.config).toEqual({ ...SD3_VAE, channels: 32, multipliers: [1, 2, 2, 2] } satisfies VaeConfig);
    const clip = { vocabSize: 1000, positions: 77, bosId: 998, eosId: 999 };
    expect(parts.clipL?.config).toEqual({
      ...clip,
      width: 32,
      layers: 3,
      heads: 2,
      mlpWidth: 64,
      activation: 'quick_gelu',
      projection: false,
      pooledWidth: 32,
      padId: 999,
    } satisfies ClipConfig);
    expect(parts.clipG?.config).toEqual({
      ...clip,
      width: 48,
      layers: 4,
      heads: 3,
      mlpWidth: 96,
      activation: 'gelu',
      projection: true,
      pooledWidth: 48,
      padId: 0,
    } satisfies ClipConfig);
    expect(parts.t5?.config).toEqual({
      width: 96,
      layers: 3,
      heads: 4,
      headDim: 24,
      mlpWidth: 160,
      vocabSize: 300,
      tokens: 77,
      buckets: 32,
      maxDistance: 128,
    } satisfies T5Config);
    expect(parts.transformer?.prefix).toBe(transformerPrefix);
    expect(tokenizers).toEqual({});
  });

  test('a transformer alone, heads of 32, whose values can be read', async () => {
    const { parts } = await openCheckpoint([bytesSource(trainModel)]);
    expect(Object.keys(parts)).toEqual(['transformer']);
    expect(parts.transformer?.config).toMatchObject({ headDim: 32, heads: 2, inChannels: 4, tableSize: 12, depth: 3 });
    const weight = parts.transformer!.tensors.get('joint_blocks.0.x_block.attn.ln_q.weight')!;
    const values = await readWeight(weight);
    expect(values.shape).toEqual([32]);
    expect(toFloat32(values).every((value) => Math.abs(value - 1) < 1)).toBe(true);
  });
});

describe('the released models, by their names and shapes', () => {
  const sources = {
    main: shapesSource(join(released.transformer, released.vae), 'sd3.5_medium.safetensors'),
    clipL: shapesSource(released.clipL, 'a.safetensors'),
    clipG: shapesSource(released.clipG, 'b.safetensors'),
    t5: shapesSource(released.t5, 'c.safetensors', {}, 'bfloat16'),
  };

  test('split files in any order', async () => {
    const { parts } = await openCheckpoint([sources.t5, sources.clipG, sources.main, sources.clipL]);
    expect(parts.transformer?.config).toEqual(SD35_MEDIUM_TRANSFORMER);
    expect(parts.vae?.config).toEqual(SD3_VAE);
    expect(parts.clipL?.config).toEqual(CLIP_L);
    expect(parts.clipG?.config).toEqual(CLIP_G);
    expect(parts.t5?.config).toEqual(T5_XXL);
    expect(parts.clipG?.file).toBe('b.safetensors');
  });

  test('an all-in-one file, and one without T5', async () => {
    const encoders = join(
      prefixed('text_encoders.clip_l.transformer.', released.clipL),
      prefixed('text_encoders.clip_g.transformer.', released.clipG),
    );
    const bundle = join(released.transformer, released.vae, encoders);
    expect(Object.keys((await openCheckpoint([shapesSource(bundle)])).parts)).toEqual([
      'transformer',
      'vae',
      'clipL',
      'clipG',
    ]);
    const all = join(bundle, prefixed('text_encoders.t5xxl.transformer.', released.t5));
    expect((await openCheckpoint([shapesSource(all)])).parts.t5?.config).toEqual(T5_XXL);
  });

  test('parts without a prefix, one file each', async () => {
    const parts = [transformerTensors(SD35_MEDIUM_TRANSFORMER), vaeTensors(SD3_VAE)].map((part) => shapesSource(part));
    const checkpoint = await openCheckpoint(parts);
    expect(checkpoint.parts.transformer?.prefix).toBe('');
    expect(checkpoint.parts.vae?.tensors.size).toBe(244);
  });

  test('SD3 Medium, without QK norm, and SD3.5 Large', async () => {
    for (const config of [SD3_MEDIUM_TRANSFORMER, SD35_LARGE_TRANSFORMER]) {
      const { parts } = await openCheckpoint([shapesSource(transformerTensors(config))]);
      expect(parts.transformer?.config).toEqual(config);
    }
  });

  test('each CLIP encoder by itself, CLIP-L with a projection it does not use, too', async () => {
    expect(Object.keys((await openCheckpoint([sources.clipL])).parts)).toEqual(['clipL']);
    expect(Object.keys((await openCheckpoint([sources.clipG])).parts)).toEqual(['clipG']);
    const projected = new Map([...released.clipL, ['text_projection.weight', [768, 768]] as const]);
    const { parts } = await openCheckpoint([shapesSource(projected)]);
    expect(parts.clipL?.config).toEqual(CLIP_L);
    expect(parts.clipL?.tensors.has('text_projection.weight')).toBe(false);
  });

  test('T5 with its table under either name, or both', async () => {
    const { 'shared.weight': table, ...rest } = Object.fromEntries(released.t5);
    const renamed = new Map(Object.entries({ 'encoder.embed_tokens.weight': table!, ...rest }));
    const either = await openCheckpoint([shapesSource(renamed)]);
    expect(either.parts.t5?.config).toEqual(T5_XXL);
    expect(either.parts.t5?.tensors.get('shared.weight')?.name).toBe('encoder.embed_tokens.weight');
    const both = await openCheckpoint([shapesSource(join(released.t5, renamed))]);
    expect(both.parts.t5?.tensors.get('shared.weight')?.name).toBe('shared.weight');
    expect(both.parts.t5?.tensors.size).toBe(released.t5.size);
  });

  test('extra tensors are tolerated', async () => {
    const extra = new Map([
      ...released.clipL,
      ['logit_scale', []] as const,
      ['text_model.embeddings.position_ids', [1, 77]] as const,
      ['loss.logvar', []] as const,
    ]);
    const { parts } = await openCheckpoint([shapesSource(extra)]);
    expect(parts.clipL?.tensors.size).toBe(196);
  });
});

describe('what shapes cannot tell', () => {
  const small: ClipConfig = { ...CLIP_L, width: 96, pooledWidth: 96, heads: 2, layers: 1, mlpWidth: 64, positions: 24 };

  test('comes from metadata', async () => {
    const metadata = {
      'mmditx.config': '{"clipL": {"heads": 2, "padId": 5}, "t5": {"tokens": 16}}',
      'mmditx.tokenizer.clip': '{"model": {}}',
    };
    const t5 = prefixed('t5.', t5Tensors({ ...T5_XXL, layers: 1, width: 8, heads: 2, headDim: 3, mlpWidth: 4 }));
    const shapes = join(prefixed('text_encoders.clip_l.', clipTensors(small)), t5);
    const { parts, tokenizers } = await openCheckpoint([shapesSource(shapes, 'x', metadata)]);
    expect(parts.clipL?.config).toEqual({ ...small, padId: 5 });
    expect(parts.t5?.config).toMatchObject({ tokens: 16, headDim: 3 });
    expect(tokenizers).toEqual({ clip: '{"model": {}}' });
  });

  test('two CLIP encoders without a name are told by width', async () => {
    const wide = clipTensors({ ...small, width: 128, pooledWidth: 128 });
    const narrow = clipTensors({ ...small, width: 64, pooledWidth: 64 });
    const projected = new Map([...wide, ['text_projection.weight', [128, 128]] as const]);
    const { parts } = await openCheckpoint([shapesSource(projected, 'wide'), shapesSource(narrow, 'narrow')]);
    expect([parts.clipL?.file, parts.clipG?.file]).toEqual(['narrow', 'wide']);
  });

  test('heads that nothing tells are an error', async () => {
    expect((await refusal(shapesSource(clipTensors(small), 'small'))).message).toMatch(
      /text encoder 96 wide does not divide into heads of 64/,
    );
  });
});

describe('incomplete and damaged checkpoints', () => {
  test('missing tensors are counted and the first named', async () => {
    const shapes = new Map(transformerTensors(SD35_MEDIUM_TRANSFORMER));
    for (const name of [...shapes.keys()].filter((key) => key.startsWith('joint_blocks.20.'))) shapes.delete(name);
    const error = await refusal(shapesSource(shapes, 'cut.safetensors'));
    expect(error.code).toBe('missing-part');
    expect(error.message).toMatch(
      /^cut\.safetensors lacks 24 of the 665 tensors of the transformer \(joint_blocks\.20\.x_block\.adaLN\S+, .* and 21 more\)/,
    );
  });

  test.each(['x_embedder.proj.weight', 'pos_embed', 'final_layer.linear.bias'])('without %s', async (name) => {
    const shapes = new Map(transformerTensors(SD35_MEDIUM_TRANSFORMER));
    shapes.delete(name);
    const error = await refusal(shapesSource(shapes));
    expect(error.code).toBe('missing-part');
    expect(error.message).toContain(name);
  });

  test.each<[string, number[], RegExp]>([
    ['pos_embed', [1, 147455, 1536], /147455 rows of its table of positions are not a square/],
    ['pos_embed', [147456, 1536], /"?pos_embed"? of .* has the shape \[147456,1536\]/],
    ['joint_blocks.3.x_block.mlp.fc1.weight', [6144, 1535], /\[6144,1535\] where the transformer needs \[6144,1536\]/],
    ['joint_blocks.0.x_block.attn.ln_q.weight', [7], /does not divide into heads of 7/],
    ['joint_blocks.999999999.x_block.attn.qkv.weight', [1], /numbers its blocks up to 999999999/],
    ['final_layer.linear.weight', [63, 1536], /63 outputs per token/],
  ])('%s of shape %j is refused', async (name, shape, message) => {
    const shapes = new Map([...transformerTensors(SD35_MEDIUM_TRANSFORMER), [name, shape] as const]);
    expect((await refusal(shapesSource(shapes))).message).toMatch(message);
  });

  test('quantised weights of an unknown kind are refused', async () => {
    const source = shapesSource(transformerTensors(SD3_MEDIUM_TRANSFORMER), 'int8.safetensors', {}, 'uint8');
    expect(await refusal(source)).toMatchObject({ code: 'unsupported-model', message: /holds uint8 values/ });
  });
});

describe('other models are refused by name', () => {
  test.each([
    ['model.diffusion_model.input_blocks.0.0.weight', /holds Stable Diffusion 1 or 2/],
    ['conditioner.embedders.1.model.ln_final.bias', /holds Stable Diffusion XL/],
    ['model.diffusion_model.double_blocks.0.img_attn.qkv.weight', /holds FLUX/],
    ['double_blocks.0.img_attn.qkv.weight', /holds FLUX/],
    ['single_transformer_blocks.0.attn.to_q.weight', /holds FLUX/],
    ['joint_transformer_blocks.0.attn.add_q_proj.weight', /holds AuraFlow/],
    ['down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight', /holds Stable Diffusion 1, 2 or XL/],
    ['mid_block.resnets.0.time_emb_proj.weight', /holds Stable Diffusion 1, 2 or XL/],
    ['transformer_blocks.0.attn.to_q.weight.absmax', /quantised by bitsandbytes/],
    ['lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight', /holds a LoRA, .* with --lora FILE\.$/],
    ['transformer.transformer_blocks.0.attn.to_q.lora_A.weight', /holds a LoRA/],
    ['controlnet_blocks.0.weight', /holds a ControlNet/],
    ['quant_conv.weight', /holds the VAE of Stable Diffusion 1, 2 or XL/],
    ['bert.embeddings.word_embeddings.weight', /names like "bert\.embeddings\.word_embeddings\.weight"/],
  ])('%s', async (name, message) => {
    // Stable Diffusion XL's file has the U-Net's blocks as well.
    const tensors = { 'input_blocks.0.0.weight': floats([1], [1]), [name]: floats([1], [1]) };
    const source = name.startsWith('conditioner')
      ? tensorsSource(tensors)
      : tensorsSource({ [name]: floats([1], [1]) });
    const error = await refusal(source);
    expect(error.code).toBe('unsupported-model');
    expect(error.message).toMatch(message);
  });

  test('a file without tensors', async () => {
    expect((await refusal(tensorsSource({}))).message).toMatch(/it holds no tensors/);
  });
});

describe('files that do not belong together', () => {
  const medium = shapesSource(released.transformer, 'medium');
  test.each<[string, ReadonlyMap<string, readonly number[]>, RegExp]>([
    ['VAE', vaeTensors({ ...SD3_VAE, latentChannels: 4 }), /a VAE of 4 latent channels, but medium has .* 16 latent/],
    ['T5', t5Tensors({ ...T5_XXL, width: 2048 }), /a T5 2048 wide, but medium has .* 4096 wide/],
    ['CLIP-L', clipTensors({ ...CLIP_L, width: 2048, pooledWidth: 2048 }), /pooled vectors 2048 wide/],
  ])('a %s of another width', async (_, shapes, message) => {
    const error = await refusal(medium, shapesSource(shapes, 'other'));
    expect(error.code).toBe('bad-option');
    expect(error.message).toMatch(message);
  });

  test('CLIP encoders whose pooled widths do not add up', async () => {
    const narrow = clipTensors({ ...CLIP_G, width: 1024, pooledWidth: 1024, heads: 16 });
    const error = await refusal(medium, shapesSource(released.clipL, 'l'), shapesSource(narrow, 'g'));
    expect(error.message).toMatch(
      /g has a text encoder that makes pooled vectors 1792 wide, but medium has .* 2048 wide/,
    );
  });

  test('a part given twice', async () => {
    const error = await refusal(medium, shapesSource(released.transformer, 'again'));
    expect(error).toMatchObject({ code: 'bad-option', message: /^Both medium .* and again .* hold a transformer/ });
  });

  test('one encoder of the three is fine', async () => {
    const { parts } = await openCheckpoint([medium, shapesSource(released.clipG, 'g')]);
    expect(Object.keys(parts)).toEqual(['transformer', 'clipG']);
  });
});

describe('mutated files', () => {
  /** A small, seeded generator (Marsaglia's xorshift32). */
  function randomIntegers(seed: number): (below: number) => number {
    let state = seed;
    return (below) => {
      state ^= state << 13;
      state ^= state >>> 17;
      state ^= state << 5;
      return (state >>> 0) % below;
    };
  }

  const numbers = [
    '0',
    '-1',
    '1e999',
    '9007199254740993',
    '4294967296',
    '1.5',
    'null',
    '"1"',
    '[]',
    '18446744073709551615',
  ];

  function mutate(original: string, dataBytes: number, random: (below: number) => number): Uint8Array {
    let header = original;
    for (let round = random(3); round >= 0; round--) {
      const at = random(header.length);
      const kind = random(6);
      if (kind === 0) header = header.slice(0, at) + String.fromCharCode(random(256)) + header.slice(at + 1);
      else if (kind === 1) header = header.slice(0, at);
      else if (kind === 2) header = header.slice(0, at) + header.slice(at + random(40));
      else if (kind === 3)
        header = header.slice(0, at) + header.slice(random(header.length), at + 60) + header.slice(at);
      else {
        const digits = [...header.matchAll(/\d+/g)];
        const chosen = digits[random(digits.length)];
        if (!chosen) continue;
        header =
          header.slice(0, chosen.index) +
          numbers[random(numbers.length)] +
          header.slice(chosen.index + chosen[0].length);
      }
    }
    const length = random(8) === 0 ? BigInt(random(2 ** 31)) * BigInt(random(2 ** 31)) : undefined;
    return rawSafetensors(header, random(8) === 0 ? random(2 * dataBytes) : dataBytes, length);
  }

  test('are refused in a sentence or read, without reading beyond the file', async () => {
    const config: TransformerConfig = { ...SD35_MEDIUM_TRANSFORMER, hiddenSize: 2, headDim: 1, heads: 2, depth: 2 };
    const shapes = transformerTensors({
      ...config,
      mlpHidden: 2,
      contextWidth: 2,
      pooledWidth: 2,
      timestepWidth: 2,
      tableSize: 2,
      dualAttentionLayers: [0],
    });
    const { header, size } = headerOf(shapes, 'float16', { 'mmditx.config': '{"vae": {"groups": 4}}' });
    const original = new TextDecoder().decode(header.subarray(8));
    const random = randomIntegers(20240607);
    const outcomes = { refused: 0, read: 0 };
    for (let round = 0; round < 600; round++) {
      const bytes = mutate(original, size - header.length, random);
      const whole = bytesSource(bytes);
      const source: ByteSource = {
        ...whole,
        read: (offset, length) => {
          expect(offset + length).toBeLessThanOrEqual(bytes.length);
          return whole.read(offset, length);
        },
      };
      for (const open of [() => openSafetensors(source), () => openCheckpoint([source])]) {
        try {
          await open();
          outcomes.read++;
        } catch (error) {
          if (!(error instanceof MmditxError)) throw error;
          expect(error.message.length).toBeLessThan(700);
          outcomes.refused++;
        }
      }
    }
    // Neither always broken nor hardly touched.
    expect(outcomes.refused).toBeGreaterThan(500);
    expect(outcomes.read).toBeGreaterThan(20);
  });

  test('shapes and names at random give a checkpoint or a sentence', async () => {
    const random = randomIntegers(7);
    const originals = [released.transformer, released.vae, released.clipG, released.t5];
    const sizes = [0, 1, 3, 64, 2 ** 20];
    for (let round = 0; round < 150; round++) {
      const shapes = new Map(originals[round % originals.length]!);
      const names = [...shapes.keys()];
      for (let change = random(3); change >= 0; change--) {
        const name = names[random(names.length)]!;
        const shape = shapes.get(name) ?? [1];
        shapes.delete(name);
        if (random(3) === 0) continue;
        const renamed = random(2) ? name : name.replace(/\d+/, String(random(2 ** 31)));
        shapes.set(renamed, random(2) ? shape : shape.map((size) => (random(2) ? size : sizes[random(sizes.length)]!)));
      }
      await openCheckpoint([shapesSource(shapes)]).catch((error) => expect(error).toBeInstanceOf(MmditxError));
    }
  });
});
