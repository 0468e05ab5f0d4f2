/** Text to token ids, with the vocabularies that models bring along as `tokenizer.json`. */
import { Tokenizer } from '@huggingface/tokenizers';
import { MmditxError } from '../errors.ts';
import { parseJson } from '../weights/json.ts';
import { tokenizerSchema } from './tokenizer-file.ts';

/** Byte-level BPE of CLIP-L and CLIP-G. What follows the end token is padding, which differs between the two encoders. */
export interface ClipTokenizer {
  /** All ids of a text, in full length and without the start and end ids. */
  encode(text: string): number[];
  readonly start: number;
  readonly end: number;
}

/** SentencePiece unigram vocabulary of T5. */
export interface T5Tokenizer {
  /** All ids of a text, in full length and without the end id. */
  encode(text: string): number[];
  readonly end: number;
  readonly pad: number;
}

/**
 * @param json the text of CLIP's `tokenizer.json`
 * @throws MmditxError `bad-file` when it is no such file, asks for steps that CLIP does not have, or does not put one token before and one after a text
 */
export function clipTokenizer(json: string): ClipTokenizer {
  const tokenizer = readTokenizer(json, 'CLIP');
  const [start, end, ...others] = idsAround(tokenizer);
  if (start === undefined || end === undefined || others.length > 0) {
    throw notATokenizer('CLIP', 'it must put one token before and one after a text');
  }
  return { encode: (text) => encodeBare(tokenizer, text), start, end };
}

/**
 * @param json the text of T5's `tokenizer.json`
 * @throws MmditxError `bad-file` when it is no such file, asks for steps that T5 does not have, has no `<pad>`, or does
 *   not put one token after a text
 */
export function t5Tokenizer(json: string): T5Tokenizer {
  const tokenizer = readTokenizer(json, 'T5');
  const [end, ...others] = idsAround(tokenizer);
  const pad = tokenizer.token_to_id('<pad>');
  if (end === undefined || others.length > 0) throw notATokenizer('T5', 'it must put one token after a text');
  if (pad === undefined) throw notATokenizer('T5', 'it has no <pad> token');
  return { encode: (text) => encodeBare(tokenizer, text), end, pad };
}

/** The ids that stand before and after every text; undefined for a token that the vocabulary lacks. */
function idsAround(tokenizer: Tokenizer): (number | undefined)[] {
  return tokenizer.encode('').ids;
}

function encodeBare(tokenizer: Tokenizer, text: string): number[] {
  return tokenizer.encode(text, { add_special_tokens: false }).ids;
}

function readTokenizer(json: string, encoder: string): Tokenizer {
  const parsed = tokenizerSchema.safeParse(parseJson(json, (fault) => notATokenizer(encoder, `it ${fault}`)));
  if (!parsed.success) {
    const issue = parsed.error.issues[0];
    throw notATokenizer(encoder, `it is wrong at "${issue?.path.join('.')}" (${issue?.message})`);
  }
  // The second argument stands for tokenizer_config.json: everything that encoding needs is in tokenizer.json.
  return new Tokenizer(parsed.data, {});
}

function notATokenizer(encoder: string, reason: string): MmditxError {
  return new MmditxError('bad-file', `The tokenizer.json for ${encoder} cannot be used: ${reason}.`);
}
