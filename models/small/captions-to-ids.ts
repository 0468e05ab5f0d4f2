/** Captions as the ids the three encoders take. */

import { endOfText } from '../../src/models/clip.ts';
import type { ClipConfig, T5Config } from '../../src/models/config.ts';
import { relativeBuckets } from '../../src/models/t5.ts';
import type { TensorData } from '../../src/tensor/data.ts';
import { clipTokenizer, t5Tokenizer } from '../../src/text/tokenizer.ts';
import { trainClipTokenizer, trainT5Tokenizer } from '../../src/training/tokenizer-training.ts';
import { clipG, clipL, t5 } from './configs.ts';
import { allCaptionTexts } from './data/captions.ts';

/** Upper bounds; the captions' words need fewer, and each becomes one token. */
const CLIP_VOCABULARY = 2600;
const T5_VOCABULARY = 900;

export interface Texts {
  readonly tokenizers: { readonly clip: string; readonly t5: string };
  readonly clipL: ClipConfig;
  readonly clipG: ClipConfig;
  readonly t5: T5Config;
  /** Inputs of the three encoders for a batch of captions. */
  inputs(captions: readonly string[]): Record<string, TensorData>;
}

/** Trains the tokenizers, which takes seconds and gives the same every time. */
export function prepareTexts(): Texts {
  const captions = allCaptionTexts();
  const tokenizers = {
    clip: trainClipTokenizer(captions, { vocabularySize: CLIP_VOCABULARY }),
    t5: trainT5Tokenizer(captions, { vocabularySize: T5_VOCABULARY, lowercase: true }),
  };
  const clip = clipTokenizer(tokenizers.clip);
  const sentencePiece = t5Tokenizer(tokenizers.t5);
  const [configL, configG, configT5] = [
    clipL(clip.end + 1),
    clipG(clip.end + 1),
    t5(JSON.parse(tokenizers.t5).model.vocab.length),
  ];

  const rows = (texts: readonly string[], length: number, pad: number, encode: (text: string) => number[]) => {
    const data = new Int32Array(texts.length * length).fill(pad);
    for (const [item, text] of texts.entries()) {
      const ids = encode(text);
      if (ids.length > length) throw new RangeError(`"${text}" has ${ids.length} tokens, the model takes ${length}.`);
      data.set(ids, item * length);
    }
    return { dtype: 'int32', shape: [texts.length, length], data } as const;
  };
  const clipIds = (text: string) => [clip.start, ...clip.encode(text), clip.end];
  return {
    tokenizers,
    clipL: configL,
    clipG: configG,
    t5: configT5,
    inputs(texts) {
      const idsL = rows(texts, configL.positions, configL.padId, clipIds);
      const idsG = rows(texts, configG.positions, configG.padId, clipIds);
      const idsT5 = rows(texts, configT5.tokens, sentencePiece.pad, (text) => [
        ...sentencePiece.encode(text),
        sentencePiece.end,
      ]);
      return {
        'clipL.ids': idsL,
        'clipL.end': endOfText(idsL.data, configL),
        'clipG.ids': idsG,
        'clipG.end': endOfText(idsG.data, configG),
        't5.ids': idsT5,
        't5.buckets': relativeBuckets(configT5.tokens, configT5),
      };
    },
  };
}
