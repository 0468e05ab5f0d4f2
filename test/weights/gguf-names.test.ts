import { readFileSync } from 'node:fs';
import { expect, test } from 'vitest';
import { t5Tensors } from '../../src/weights/expected.ts';
import { officialName } from '../../src/weights/gguf-names.ts';

/** From the names of llama.cpp to those of Transformers, by the package `gguf`. */
const t5Names: Record<string, string> = JSON.parse(
  readFileSync(new URL('../fixtures/gguf/t5-names.json', import.meta.url), 'utf8'),
);

test("llama.cpp's names of T5 become those of Transformers", () => {
  for (const [gguf, official] of Object.entries(t5Names)) expect(officialName(gguf)).toBe(official);
});

test('they are all the names that the T5 encoder here asks for', () => {
  const sizes = { width: 4, heads: 1, headDim: 4, mlpWidth: 8, vocabSize: 4, tokens: 4, buckets: 2, maxDistance: 4 };
  expect(Object.keys(t5Names).map(officialName).sort()).toEqual([...t5Tensors({ ...sizes, layers: 2 }).keys()].sort());
});

test('a prefix stays', () => {
  const prefix = 'text_encoders.t5xxl.transformer.';
  for (const [gguf, official] of Object.entries(t5Names)) expect(officialName(prefix + gguf)).toBe(prefix + official);
  expect(officialName('text_encoders.clip_g.transformer.text_model.text_projection')).toBe(
    'text_encoders.clip_g.transformer.text_projection.weight',
  );
});

test.each([
  'pos_embed',
  'joint_blocks.23.context_block.adaLN_modulation.1.weight',
  'model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight',
  'first_stage_model.decoder.mid.attn_1.q.weight',
  'text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight',
  'text_projection.weight',
  'encoder.block.0.layer.0.SelfAttention.q.weight',
  'shared.weight',
  'blk.0.attn_q.weight',
  'dec.blk.0.attn_q.weight',
  'enc.blk.0.constructor.weight',
  'enc.blk.x.attn_q.weight',
  'enc.blk.0.attn_q.bias',
  'other_token_embd.weight',
  'output_norm.weight',
  '',
])('%j stays as it is', (name) => {
  expect(officialName(name)).toBe(name);
});
