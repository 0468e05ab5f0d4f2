import { existsSync, readFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { MmditxError } from '../../src/errors.ts';
import { clipTokenizer, t5Tokenizer } from '../../src/text/tokenizer.ts';
import {
  applyTokenWeights,
  type EncoderTokens,
  isWeighted,
  type TextEncoders,
  type TokenOptions,
  tokenizePrompt,
} from '../../src/text/tokens.ts';
import { trainClipTokenizer, trainT5Tokenizer } from '../../src/training/tokenizer-training.ts';

// A small vocabulary in which each of these words is one token, for CLIP and for T5.
const words = 'zero one two three four five six seven eight nine ten'.split(' ');
const captions = Array.from({ length: 3 }, () => words.join(' '));
const clip = clipTokenizer(trainClipTokenizer(captions, { vocabularySize: 600 }));
const t5 = t5Tokenizer(trainT5Tokenizer(captions, { vocabularySize: 150 }));
/** Encoders with room for 10 words between start and end. */
const small: TextEncoders = {
  clipL: { tokenizer: clip, positions: 12 },
  clipG: { tokenizer: clip, positions: 12 },
  t5: { tokenizer: t5 },
};
const sentence = (count: number) => Array.from({ length: count }, (_, i) => words[i % words.length]).join(' ');
const clipIds = (text: string) => clip.encode(text);
const rowsOf = (tokens: EncoderTokens | undefined) => tokens?.rows.map(({ ids }) => [...ids]);
const weightsOf = (tokens: EncoderTokens | undefined) => tokens?.rows.map(({ weights }) => [...weights]);

describe('tokenizePrompt', () => {
  it('pads CLIP-L with the end id, CLIP-G with 0 and T5 with its pad id', () => {
    const tokens = tokenizePrompt('one two', small, { t5Tokens: { minimum: 5 } });
    const start = [clip.start, ...clipIds('one two'), clip.end];
    expect(rowsOf(tokens.clipL)).toEqual([[...start, ...Array.from({ length: 8 }, () => clip.end)]]);
    expect(rowsOf(tokens.clipG)).toEqual([[...start, ...Array.from({ length: 8 }, () => 0)]]);
    expect(rowsOf(tokens.t5)).toEqual([[...t5.encode('one two'), t5.end, t5.pad, t5.pad]]);
    expect(tokens.warnings).toEqual([]);
    expect(isWeighted(tokens.clipL!)).toBe(false);
  });

  it('encodes an empty prompt as start, end, padding, which is also the empty row that weights refer to', () => {
    const { clipL, clipG, t5: tokensT5 } = tokenizePrompt('', small, { t5Tokens: { length: 4 } });
    for (const tokens of [clipL, clipG, tokensT5]) expect(rowsOf(tokens)).toEqual([[...tokens!.empty]]);
    expect([...tokensT5!.empty]).toEqual([t5.end, t5.pad, t5.pad, t5.pad]);
    expect([...clipG!.empty.slice(0, 3)]).toEqual([clip.start, clip.end, 0]);
  });

  it('gives each token the weight of its segment, the tokens around the text 1', () => {
    const tokens = tokenizePrompt('one (two three:1.5) ((four))', small, { t5Tokens: { minimum: 6 } });
    const fourth = Math.fround(1.1 * 1.1);
    expect(weightsOf(tokens.clipG)).toEqual([[1, 1, 1.5, 1.5, fourth, 1, 1, 1, 1, 1, 1, 1]]);
    expect(weightsOf(tokens.t5)).toEqual([[1, 1.5, 1.5, fourth, 1, 1]]);
    expect(rowsOf(tokens.clipG)![0]!.slice(1, 5)).toEqual(clipIds('one two three four'));
    expect(isWeighted(tokens.t5!)).toBe(true);
    expect(isWeighted(tokenizePrompt('(one)', small, { syntax: 'none' }).t5!)).toBe(false);
    expect(weightsOf(tokenizePrompt('[one]', small, { syntax: 'a1111' }).clipL)![0]![1]).toBeCloseTo(1 / 1.1, 6);
  });

  it('leaves out the encoders that a model lacks', () => {
    const tokens = tokenizePrompt('one', { clipG: small.clipG! });
    expect(Object.keys(tokens)).toEqual(['clipG', 'warnings']);
  });

  it('takes a prompt for each encoder, and gives CLIP-L and CLIP-G as many rows', () => {
    const tokens = tokenizePrompt({ clipL: sentence(25), clipG: 'one' }, small);
    expect(tokens.clipL!.rows).toHaveLength(3);
    expect(rowsOf(tokens.clipG)!.slice(1)).toEqual([[...tokens.clipG!.empty], [...tokens.clipG!.empty]]);
    expect(rowsOf(tokens.clipG)![0]![1]).toBe(clipIds('one')[0]);
    expect([...tokens.t5!.rows[0]!.ids]).toEqual([...tokens.t5!.empty]);
  });

  describe('on a long prompt', () => {
    it('fills one row exactly without a second row or a warning', () => {
      for (const longPrompt of ['chunk', 'truncate'] as const) {
        const { clipL, warnings } = tokenizePrompt(sentence(10), small, { longPrompt });
        expect(rowsOf(clipL)).toEqual([[clip.start, ...clipIds(sentence(10)), clip.end]]);
        expect(warnings).toEqual([]);
      }
    });

    it('makes rows of start, text, end in chunk mode', () => {
      const { clipL, clipG, warnings } = tokenizePrompt(sentence(11), small);
      const ids = clipIds(sentence(11));
      expect(rowsOf(clipL)![0]).toEqual([clip.start, ...ids.slice(0, 10), clip.end]);
      expect(rowsOf(clipL)![1]!.slice(0, 3)).toEqual([clip.start, ids[10], clip.end]);
      expect(clipG!.rows).toHaveLength(2);
      expect(warnings).toEqual([]);
    });

    it('moves a weighted segment of fewer than 8 tokens to the next row whole, and breaks longer ones', () => {
      const moved = tokenizePrompt(`${sentence(8)} (two three four:2)`, small).clipG!;
      expect(rowsOf(moved)![0]!.slice(9)).toEqual([clip.end, 0, 0]);
      expect(weightsOf(moved)![1]!.slice(0, 5)).toEqual([1, 2, 2, 2, 1]);
      const broken = tokenizePrompt(`${sentence(8)} (${sentence(8)}:2)`, small).clipG!;
      expect(weightsOf(broken)![0]!.slice(8)).toEqual([1, 2, 2, 1]);
      expect(weightsOf(broken)![1]!.slice(0, 8)).toEqual([1, 2, 2, 2, 2, 2, 2, 1]);
    });

    it('breaks a segment that no row could hold, even a short one', () => {
      const narrow = { clipL: { tokenizer: clip, positions: 5 } };
      expect(tokenizePrompt('one two three four five', narrow).clipL!.rows).toHaveLength(2);
    });

    it('keeps the end and names the cut words in truncate mode', () => {
      const prompt = `${sentence(9)}, ten (Élan:1.2) vital`;
      const { clipL, clipG, warnings } = tokenizePrompt(prompt, small, { longPrompt: 'truncate' });
      expect(rowsOf(clipL)).toEqual([[clip.start, ...clipIds(`${sentence(9)},`), clip.end]]);
      expect(rowsOf(clipG)).toEqual(rowsOf(clipL));
      expect(warnings).toEqual([
        'CLIP-L and CLIP-G read the first 10 tokens of the prompt; these words were cut: "ten Élan vital".',
      ]);
    });

    it('names a word that is cut in its middle', () => {
      const { warnings } = tokenizePrompt(`${sentence(8)} zebra one`, small, { longPrompt: 'truncate' });
      expect(warnings[0]).toContain('these words were cut: "zebra one".');
    });

    it('shortens a long list of cut words', () => {
      const { warnings } = tokenizePrompt(sentence(500), { clipL: small.clipL! }, { longPrompt: 'truncate' });
      expect(warnings[0]).toMatch(/^CLIP-L reads .* \(\d+ more characters\)\.$/);
      expect(warnings[0]!.length).toBeLessThan(500);
    });

    it('leaves T5 whole above its minimum, and cuts it at a fixed length with a warning', () => {
      const onlyT5 = { t5: small.t5! };
      const whole = tokenizePrompt(sentence(11), onlyT5, { t5Tokens: { minimum: 5 } });
      expect(rowsOf(whole.t5)).toEqual([[...t5.encode(sentence(11)), t5.end]]);
      expect(whole.t5!.empty).toHaveLength(12);
      expect(whole.warnings).toEqual([]);
      const cut = tokenizePrompt(sentence(11), onlyT5, { t5Tokens: { length: 5 } });
      expect(rowsOf(cut.t5)).toEqual([[...t5.encode(sentence(4)), t5.end]]);
      expect(cut.warnings[0]).toContain('T5 reads the first 4 tokens of the prompt');
      expect(cut.warnings[0]).toContain('"four five six seven eight nine ten"');
    });

    it('warns of edge artifacts from 257 T5 tokens on, padding included', () => {
      const onlyT5 = { t5: small.t5! };
      expect(tokenizePrompt(sentence(255), onlyT5).warnings).toEqual([]);
      expect(tokenizePrompt(sentence(256), onlyT5).warnings).toEqual([
        'T5 gets 257 tokens: beyond 256, this model was not trained and may draw artifacts at the edges.',
      ]);
      expect(tokenizePrompt('one', onlyT5, { t5Tokens: { length: 512 } }).warnings[0]).toContain('T5 gets 512 tokens');
    });

    it('refuses an enormous prompt', () => {
      expect(() => tokenizePrompt('x'.repeat(100_001), small)).toThrow(/100001 characters.*100000/);
      expect(() => tokenizePrompt(sentence(4097), small)).toThrow(/4097 CLIP-L tokens.*4096/);
      expect(tokenizePrompt(sentence(4096), small).clipL!.rows).toHaveLength(410);
    });
  });

  it('refuses lengths that leave no room', () => {
    const bad = (encoders: TextEncoders, options?: TokenOptions) => () => tokenizePrompt('one', encoders, options);
    expect(bad({ clipL: { tokenizer: clip, positions: 2 } })).toThrow(MmditxError);
    expect(bad(small, { t5Tokens: { length: 0 } })).toThrow(/t5Tokens.length is 0/);
    expect(bad(small, { t5Tokens: { minimum: 1.5 } })).toThrow(/t5Tokens.minimum is 1.5/);
    expect(bad(small, { t5Tokens: { length: 1e9 } })).toThrow(MmditxError);
  });
});

describe('applyTokenWeights', () => {
  const hidden = Float32Array.of(1, 2, 3, 4, 5, 6);
  const empty = Float32Array.of(0, 1, 1, 1, 5, 7);

  it('scales the distance from the empty prompt, token by token', () => {
    const weighted = applyTokenWeights(hidden, Float32Array.of(1, 2, 0.5), empty);
    expect([...weighted]).toEqual([1, 2, 5, 7, 5, 6.5]);
    expect([...applyTokenWeights(hidden, Float32Array.of(0, 0, 0), empty)]).toEqual([...empty]);
    expect([...hidden]).toEqual([1, 2, 3, 4, 5, 6]);
  });

  it('keeps unweighted tokens exactly, where the arithmetic would round', () => {
    const value = Float32Array.of(1e-8, 1e-8);
    const far = Float32Array.of(1, 1);
    expect([...applyTokenWeights(value, Float32Array.of(1, 2), far)]).toEqual([value[0], -1]);
  });

  it('refuses tensors that do not fit', () => {
    expect(() => applyTokenWeights(hidden, Float32Array.of(1, 2, 3, 4), empty)).toThrow(RangeError);
    expect(() => applyTokenWeights(hidden, Float32Array.of(1, 2, 3), empty.subarray(1))).toThrow(RangeError);
  });
});

// Agreement with the reference implementations on the published vocabularies, which this repository does not contain.
const vocabularies = new URL('../../../shared/tokenizers/', import.meta.url);
const absent = !existsSync(new URL('clip/tokenizer.json', vocabularies));

// Its `stability_*` rows stand in where `comfy_*` says "same as"; otherwise (three prompts over the limits) they come
// from tokenizing word by word, which is not offered here.

type Weighted = [id: number, weight: number][][];
interface GoldenPrompt {
  text: string;
  clip_l_77: number[];
  clip_g_77: number[];
  clip_untruncated: number[];
  t5_77: number[];
  t5_256: number[];
  t5_untruncated: number[];
  comfy_l: Weighted | string;
  comfy_g: Weighted | string;
  comfy_t5: Weighted | string;
  stability_l: Weighted;
  stability_g: Weighted;
  stability_t5: Weighted;
}
const goldenPrompts = JSON.parse(
  readFileSync(new URL('../golden/tokens.json', import.meta.url), 'utf8'),
) as GoldenPrompt[];

describe.skipIf(absent)(`published vocabularies${absent ? ' (skipped: no ../shared/tokenizers)' : ''}`, () => {
  const read = (name: string) => readFileSync(new URL(`${name}/tokenizer.json`, vocabularies), 'utf8');
  const realClip = absent ? clip : clipTokenizer(read('clip'));
  const realT5 = absent ? t5 : t5Tokenizer(read('t5'));
  const encoders: TextEncoders = {
    clipL: { tokenizer: realClip, positions: 77 },
    clipG: { tokenizer: realClip, positions: 77 },
    t5: { tokenizer: realT5 },
  };
  const diffusers: TokenOptions = { syntax: 'none', longPrompt: 'truncate', t5Tokens: { length: 256 } };

  it('covers all 31 prompts', () => {
    expect(goldenPrompts).toHaveLength(31);
    expect([realClip.start, realClip.end, realT5.end, realT5.pad]).toEqual([49406, 49407, 1, 0]);
  });

  describe.each(goldenPrompts.map((prompt, index) => [index, prompt] as const))('prompt %i', (_, expected) => {
    const weighted = (tokens: EncoderTokens | undefined, want: Weighted | string, fallback: Weighted) => {
      const reference = typeof want === 'string' ? fallback : want;
      expect(rowsOf(tokens)).toEqual(reference.map((row) => row.map(([id]) => id)));
      expect(weightsOf(tokens)).toEqual(reference.map((row) => row.map(([, weight]) => Math.fround(weight))));
    };

    it('has the ids of the whole text', () => {
      expect([realClip.start, ...realClip.encode(expected.text), realClip.end]).toEqual(expected.clip_untruncated);
      expect([...realT5.encode(expected.text), realT5.end]).toEqual(expected.t5_untruncated);
    });

    it('is padded and cut as diffusers does it, with a warning if cut', () => {
      const tokens = tokenizePrompt(expected.text, encoders, diffusers);
      expect(rowsOf(tokens.clipL)).toEqual([expected.clip_l_77]);
      expect(rowsOf(tokens.clipG)).toEqual([expected.clip_g_77]);
      expect(rowsOf(tokens.t5)).toEqual([expected.t5_256]);
      expect(tokens.warnings).toHaveLength(expected.clip_untruncated.length > 77 ? 1 : 0);
      const short = tokenizePrompt(expected.text, encoders, { ...diffusers, t5Tokens: { length: 77 } });
      expect(rowsOf(short.t5)).toEqual([expected.t5_77]);
      expect(short.warnings.some((warning) => warning.startsWith('T5'))).toBe(expected.t5_untruncated.length > 77);
    });

    it('is weighted and divided as ComfyUI does it', () => {
      const tokens = tokenizePrompt(expected.text, encoders);
      weighted(tokens.clipL, expected.comfy_l, expected.stability_l);
      weighted(tokens.clipG, expected.comfy_g, expected.stability_g);
      weighted(tokens.t5, expected.comfy_t5, expected.stability_t5);
      expect(tokens.warnings).toEqual([]);
    });
  });
});
