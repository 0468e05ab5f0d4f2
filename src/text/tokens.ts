/**
 * A prompt as the three text encoders take it: rows of token ids of the lengths they were trained with, and a weight
 * for each token. Stability's code, ComfyUI and diffusers disagree on lengths; each way is an option here, and nothing
 * is cut without a warning.
 */
import { MmditxError } from '../errors.ts';
import { type PromptSegment, type PromptSyntax, parsePromptWeights } from './prompt-weights.ts';
import type { ClipTokenizer, T5Tokenizer } from './tokenizer.ts';

/** CLIP-L is padded with its end token, CLIP-G with id 0 (Stability-AI/sd3.5 `other_impls.py`, `SDXLClipGTokenizer`). */
const clipGPad = 0;
/** ComfyUI keeps a segment of fewer tokens than this together when a chunk ends (`sd1_clip.py`, `max_word_length`). */
const longestUnbrokenSegment = 8;
/** SD3.5 Medium was trained with 77 and 256 T5 tokens; its model card warns of artifacts at the edges beyond. */
const longestTrainedT5 = 256;
/** Stability's code and ComfyUI pad T5 to CLIP's length. */
const defaultT5Minimum = 77;

/** Bounds on one prompt: characters that are looked at, and tokens of one encoder (attention memory is quadratic). */
const longestPrompt = 100_000;
const mostTokens = 4096;
/** A warning quotes at most this many of the characters that were cut. */
const longestQuote = 300;

/** The encoders that a model has. A missing one gets no tokens. */
export interface TextEncoders {
  /** `positions`: the length of the encoder's position table, 77 in the released models. */
  readonly clipL?: { readonly tokenizer: ClipTokenizer; readonly positions: number };
  readonly clipG?: { readonly tokenizer: ClipTokenizer; readonly positions: number };
  readonly t5?: { readonly tokenizer: T5Tokenizer };
}

/** A text for each encoder; one that is left out gets an empty prompt. */
export interface EncoderPrompts {
  readonly clipL?: string;
  readonly clipG?: string;
  readonly t5?: string;
}

export interface TokenOptions {
  /** How brackets are read. Default `comfy`. */
  readonly syntax?: PromptSyntax;
  /**
   * What happens to a prompt longer than CLIP's positions: `chunk` (ComfyUI, the default) makes several rows, whose
   * encodings follow each other in the context; `truncate` (diffusers) keeps the first row and warns.
   */
  readonly longPrompt?: 'chunk' | 'truncate';
  /**
   * The number of T5 tokens, end token included: `minimum` pads short prompts and leaves long ones whole (ComfyUI and
   * Stability's code, default 77); `length` pads or cuts every prompt to it (diffusers: 256, at most 512).
   */
  readonly t5Tokens?: { readonly minimum: number } | { readonly length: number };
  /** The most T5 tokens that the model was trained with; more give a warning. Default 256, SD3.5 Medium's. */
  readonly trainedT5Tokens?: number;
}

/** One row of an encoder's input. Start, end and padding have weight 1. */
export interface TokenRow {
  readonly ids: Int32Array;
  readonly weights: Float32Array;
}

export interface EncoderTokens {
  /** CLIP: one or more rows of `positions` tokens. T5: one row. */
  readonly rows: readonly TokenRow[];
  /** The ids of an empty prompt of a row's length, whose encoding `applyTokenWeights` needs. */
  readonly empty: Int32Array;
}

export interface PromptTokens {
  readonly clipL?: EncoderTokens;
  readonly clipG?: EncoderTokens;
  readonly t5?: EncoderTokens;
  /** Sentences for the user: words that were cut, lengths the model was not trained for. */
  readonly warnings: readonly string[];
}

/**
 * Token ids and weights of a prompt for each encoder. CLIP-L and CLIP-G get the same number of rows: the shorter of
 * two different prompts is followed by empty rows, as ComfyUI's `CLIPTextEncodeSD3` does it.
 *
 * @param prompt one text for all encoders, or a text for each
 * @throws MmditxError `bad-option` for a prompt of more than 100,000 characters or 4096 tokens, brackets nested deeper
 *   than 100, and lengths that leave no room for a token
 */
export function tokenizePrompt(
  prompt: string | EncoderPrompts,
  encoders: TextEncoders,
  {
    syntax = 'comfy',
    longPrompt = 'chunk',
    t5Tokens = { minimum: defaultT5Minimum },
    trainedT5Tokens = longestTrainedT5,
  }: TokenOptions = {},
): PromptTokens {
  const texts = typeof prompt === 'string' ? { clipL: prompt, clipG: prompt, t5: prompt } : prompt;
  const { clipL: encoderL, clipG: encoderG, t5: encoderT5 } = encoders;
  const clipL = encoderL && clipRows('CLIP-L', texts.clipL, encoderL, encoderL.tokenizer.end, syntax, longPrompt);
  const clipG = encoderG && clipRows('CLIP-G', texts.clipG, encoderG, clipGPad, syntax, longPrompt);
  const t5 = encoderT5 && t5Row(texts.t5, encoderT5.tokenizer, syntax, t5Tokens);

  const rowCount = Math.max(clipL?.rows.length ?? 0, clipG?.rows.length ?? 0);
  const warnings = cutWarnings([clipL?.cut, clipG?.cut, t5?.cut]);
  const t5Length = t5?.rows[0]?.ids.length ?? 0;
  if (t5Length > trainedT5Tokens) {
    warnings.push(
      `T5 gets ${t5Length} tokens: beyond ${trainedT5Tokens}, this model was not trained and may draw artifacts at the edges.`,
    );
  }
  return {
    ...(clipL && { clipL: encoderTokens(clipL, rowCount) }),
    ...(clipG && { clipG: encoderTokens(clipG, rowCount) }),
    ...(t5 && { t5: encoderTokens(t5, 1) }),
    warnings,
  };
}

interface Rows {
  rows: TokenRow[];
  emptyRow: TokenRow;
  cut?: Cut | undefined;
}

function clipRows(
  encoder: string,
  text: string | undefined,
  { tokenizer, positions }: { tokenizer: ClipTokenizer; positions: number },
  pad: number,
  syntax: PromptSyntax,
  longPrompt: 'chunk' | 'truncate',
): Rows {
  const room = requireWhole(`${encoder} positions`, positions, 3) - 2;
  const layout = { start: tokenizer.start, end: tokenizer.end, pad, length: positions };
  const emptyRow = tokenRow([], layout);
  const segments = tokenizeSegments(encoder, text, tokenizer, syntax);
  if (longPrompt === 'chunk') {
    return { rows: splitIntoChunks(segments, room).map((chunk) => tokenRow(chunk, layout)), emptyRow };
  }
  const body = segments.flatMap(tokensOf).slice(0, room);
  return { rows: [tokenRow(body, layout)], emptyRow, cut: findCut(encoder, segments, room, tokenizer) };
}

function t5Row(
  text: string | undefined,
  tokenizer: T5Tokenizer,
  syntax: PromptSyntax,
  t5Tokens: NonNullable<TokenOptions['t5Tokens']>,
): Rows {
  const segments = tokenizeSegments('T5', text, tokenizer, syntax);
  const body = segments.flatMap(tokensOf);
  const length =
    'length' in t5Tokens
      ? requireWhole('t5Tokens.length', t5Tokens.length, 1)
      : Math.max(requireWhole('t5Tokens.minimum', t5Tokens.minimum, 1), body.length + 1);
  const layout = { end: tokenizer.end, pad: tokenizer.pad, length };
  return {
    rows: [tokenRow(body.slice(0, length - 1), layout)],
    emptyRow: tokenRow([], layout),
    cut: findCut('T5', segments, length - 1, tokenizer),
  };
}

function encoderTokens({ rows, emptyRow }: Rows, rowCount: number): EncoderTokens {
  const missing = Array.from({ length: rowCount - rows.length }, () => emptyRow);
  return { rows: [...rows, ...missing], empty: emptyRow.ids };
}

/** Whether any token has a weight other than 1; if none has, `applyTokenWeights` would change nothing. */
export function isWeighted({ rows }: EncoderTokens): boolean {
  return rows.some(({ weights }) => weights.some((weight) => weight !== 1));
}

/**
 * Scales each token's distance from what the encoder makes of an empty prompt, as ComfyUI does:
 * z = (z - z_empty) * weight + z_empty. Pooled outputs are not weighted.
 *
 * @param hidden encoder output of one row, `[tokens, width]`
 * @param weights `[tokens]`
 * @param empty encoder output of the empty prompt, `[tokens, width]`
 * @returns `[tokens, width]`
 */
export function applyTokenWeights(hidden: Float32Array, weights: Float32Array, empty: Float32Array): Float32Array {
  const width = hidden.length / weights.length;
  if (!Number.isInteger(width) || empty.length !== hidden.length) {
    throw new RangeError(
      `${weights.length} weights do not fit ${hidden.length} hidden values and ${empty.length} of the empty prompt.`,
    );
  }
  return hidden.map((value, i) => {
    const weight = weights[Math.floor(i / width)]!;
    // An unweighted token keeps its exact value, which the difference and sum below might round.
    if (weight === 1) return value;
    return Math.fround(Math.fround(value - empty[i]!) * weight) + empty[i]!;
  });
}

interface Token {
  readonly id: number;
  readonly weight: number;
}

interface TextToIds {
  encode(text: string): number[];
}

interface TokenizedSegment extends PromptSegment {
  readonly ids: readonly number[];
}

/** Each segment is tokenized by itself: a weight begins and ends with a token. */
function tokenizeSegments(
  encoder: string,
  text: string | undefined,
  tokenizer: TextToIds,
  syntax: PromptSyntax,
): TokenizedSegment[] {
  const prompt = text ?? '';
  if (prompt.length > longestPrompt) {
    throw new MmditxError(
      'bad-option',
      `The prompt has ${prompt.length} characters; shorten it to at most ${longestPrompt}.`,
    );
  }
  const segments = parsePromptWeights(prompt, syntax).map((segment) => ({
    ...segment,
    ids: tokenizer.encode(segment.text),
  }));
  const count = segments.reduce((sum, { ids }) => sum + ids.length, 0);
  if (count > mostTokens) {
    throw new MmditxError(
      'bad-option',
      `The prompt has ${count} ${encoder} tokens; shorten it to at most ${mostTokens}.`,
    );
  }
  return segments;
}

function tokensOf({ ids, weight }: TokenizedSegment): Token[] {
  return ids.map((id) => ({ id, weight }));
}

/** At least one chunk of at most `room` tokens. Short segments move to the next chunk whole, as in ComfyUI. */
function splitIntoChunks(segments: readonly TokenizedSegment[], room: number): Token[][] {
  let chunk: Token[] = [];
  const chunks = [chunk];
  for (const segment of segments) {
    let rest = tokensOf(segment);
    const staysWhole = rest.length < longestUnbrokenSegment && rest.length <= room;
    while (rest.length > room - chunk.length) {
      if (!staysWhole) {
        const fitting = room - chunk.length;
        chunk.push(...rest.slice(0, fitting));
        rest = rest.slice(fitting);
      }
      chunk = [];
      chunks.push(chunk);
    }
    chunk.push(...rest);
  }
  return chunks;
}

function tokenRow(
  body: readonly Token[],
  { start, end, pad, length }: { start?: number; end: number; pad: number; length: number },
): TokenRow {
  const ids = new Int32Array(length).fill(pad);
  const weights = new Float32Array(length).fill(1);
  let position = 0;
  if (start !== undefined) ids[position++] = start;
  for (const { id, weight } of body) {
    ids[position] = id;
    weights[position++] = weight;
  }
  ids[position] = end;
  return { ids, weights };
}

/** Words that an encoder doesn't get, because it takes only `room` tokens. */
interface Cut {
  encoder: string;
  room: number;
  words: string;
}

/** The text from the first word that does not fit into the first `room` tokens, even if its beginning does. */
function findCut(
  encoder: string,
  segments: readonly TokenizedSegment[],
  room: number,
  tokenizer: TextToIds,
): Cut | undefined {
  let free = room;
  const cutSegment = segments.findIndex(({ ids }) => {
    free -= ids.length;
    return free < 0;
  });
  if (cutSegment === -1) return undefined;
  const { text, ids } = segments[cutSegment]!;
  const fits = free + ids.length;
  const words = [...new Intl.Segmenter('en', { granularity: 'word' }).segment(text)];
  // Bisect for the last word boundary with no more than `fits` tokens before it.
  let low = 0;
  let high = words.length - 1;
  while (low < high) {
    const middle = Math.ceil((low + high) / 2);
    if (tokenizer.encode(text.slice(0, words[middle]!.index)).length <= fits) low = middle;
    else high = middle - 1;
  }
  const rest = [text.slice(words[low]!.index), ...segments.slice(cutSegment + 1).map((segment) => segment.text)];
  return { encoder, room, words: rest.join('').trim() };
}

/** One sentence for each cut; encoders that miss the same words share it. */
function cutWarnings(cuts: readonly (Cut | undefined)[]): string[] {
  const encodersByLoss = new Map<string, string[]>();
  for (const cut of cuts) {
    if (!cut) continue;
    const hidden = cut.words.length - longestQuote;
    const quote = hidden > 0 ? `"${cut.words.slice(0, longestQuote)}" … (${hidden} more characters)` : `"${cut.words}"`;
    const loss = `the first ${cut.room} tokens of the prompt; these words were cut: ${quote}.`;
    encodersByLoss.set(loss, [...(encodersByLoss.get(loss) ?? []), cut.encoder]);
  }
  return [...encodersByLoss].map(
    ([loss, encoders]) => `${encoders.join(' and ')} ${encoders.length > 1 ? 'read' : 'reads'} ${loss}`,
  );
}

function requireWhole(name: string, value: number, smallest: number): number {
  if (!Number.isInteger(value) || value < smallest || value > mostTokens) {
    throw new MmditxError(
      'bad-option',
      `${name} is ${value}, but must be a whole number from ${smallest} to ${mostTokens}.`,
    );
  }
  return value;
}
