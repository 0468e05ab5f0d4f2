import { expect, test } from 'vitest';
import { CLIP_G, CLIP_L, SD3_VAE, SD35_MEDIUM_TRANSFORMER, T5_XXL } from '../../src/models/config.ts';
import { configMetadata, readHints } from '../../src/weights/metadata.ts';

test('what shapes cannot tell survives being written and read', () => {
  const metadata = configMetadata({
    transformer: SD35_MEDIUM_TRANSFORMER,
    vae: { ...SD3_VAE, groups: 8, latentScale: 2 },
    clipL: { ...CLIP_L, heads: 3 },
    clipG: CLIP_G,
    t5: { ...T5_XXL, tokens: 16 },
  });
  expect(readHints(metadata, 'x')).toEqual({
    transformer: { heads: 24 },
    vae: { groups: 8, latentScale: 2, latentShift: SD3_VAE.latentShift },
    clipL: { heads: 3, activation: 'quick_gelu', bosId: 49406, eosId: 49407, padId: 49407 },
    clipG: { heads: 20, activation: 'gelu', bosId: 49406, eosId: 49407, padId: 0 },
    t5: { tokens: 16, maxDistance: 128 },
  });
  expect(readHints(configMetadata({ t5: T5_XXL }), 'x')).toEqual({ t5: { tokens: 77, maxDistance: 128 } });
});

test('the reference models state heads, activation and token ids', () => {
  const hints = readHints(
    {
      'oracle.mmdit': '{"hidden": 128, "heads": 2}',
      'oracle.clip_l': '{"hidden_act": "quick_gelu", "num_attention_heads": 2}',
      'oracle.vocab': '{"vocab": 1000, "bos": 998, "eos": 999}',
    },
    'x',
  );
  expect(hints).toEqual({
    transformer: { heads: 2 },
    clipL: { heads: 2, activation: 'quick_gelu', bosId: 998, eosId: 999 },
  });
});

test('a file that says nothing gives no hints', () => {
  expect(Object.values(readHints({ format: 'pt' }, 'x')).filter(Boolean)).toEqual([]);
});

test.each([
  ['mmditx.config', 'heads: 2', /entry mmditx\.config of x\.safetensors is not JSON/],
  ['mmditx.config', '{"clipL": {"heads": 0}}', /is wrong at clipL\.heads/],
  ['mmditx.config', '{"clipL": {"heads": 1e300}}', /is wrong at clipL\.heads/],
  ['mmditx.config', '{"clipG": {"activation": "relu"}}', /is wrong at clipG\.activation/],
  ['mmditx.config', '[]', /entry mmditx\.config of x\.safetensors is wrong/],
  ['oracle.mmdit', '{}', /entry oracle\.mmdit of x\.safetensors is wrong at heads/],
])('%s %s is refused', (key, text, message) => {
  expect(() => readHints({ [key]: text }, 'x.safetensors')).toThrow(message);
});
