/**
 * Trains the tokenizers of a small model on its own captions and writes them as `tokenizer.json`, the format that
 * `@huggingface/tokenizers` and the published Stable Diffusion 3.5 files use. Both trainers are deterministic.
 */
import { Tokenizer } from '@huggingface/tokenizers';
import { MmditxError } from '../errors.ts';

export interface TokenizerTrainingOptions {
  /** The most entries the vocabulary may have, special tokens included. Captions with few words may yield fewer. */
  vocabularySize: number;
}

export interface T5TrainingOptions extends TokenizerTrainingOptions {
  /** Read and encode everything in lower case. The published T5 vocabulary is cased, so the default is false. */
  lowercase?: boolean;
}

/** `tokenizer.json` without its model: how text becomes words, and which special tokens surround them. */
type Layout = Record<'normalizer' | 'pre_tokenizer' | 'post_processor' | 'decoder', object> & {
  added_tokens: object[];
};

// CLIP: byte-level byte-pair encoding (Sennrich et al., arXiv 1508.07909; Radford et al., arXiv 2103.00020, section 2.4)

const startOfText = '<|startoftext|>';
const endOfText = '<|endoftext|>';
const endOfWord = '</w>';

/** A pair seen once says nothing about the language: merging it would only memorise that caption. */
const minimumPairCount = 2;

/**
 * Trains a CLIP tokenizer: lower-cased words, byte-pair merges within a word, and the published vocabulary's layout:
 * 256 bytes, the same bytes at the end of a word, the merges in the order they were learnt, `<|startoftext|>`,
 * `<|endoftext|>`. Any text can be encoded. The end token has the largest id, which text encoders rely on to find it.
 *
 * @returns the text of a `tokenizer.json`
 * @throws MmditxError `bad-option` when `vocabularySize` has no room for the 514 entries that are always there
 */
export function trainClipTokenizer(captions: Iterable<string>, { vocabularySize }: TokenizerTrainingOptions): string {
  const alphabet = byteAlphabet();
  const vocabulary = [...alphabet, ...alphabet.map((character) => character + endOfWord)];
  const specialTokens = 2;
  requireRoom(vocabularySize, vocabulary.length + specialTokens);

  const words = countWords(captions, clipLayout(vocabulary.length));
  const pieces = [...words.keys()].map((word) => {
    const characters = [...word];
    return [...characters.slice(0, -1), characters.at(-1) + endOfWord];
  });
  const room = vocabularySize - vocabulary.length - specialTokens;
  const { merges, tokens } = learnMerges(pieces, [...words.values()], room);
  vocabulary.push(...tokens);

  const layout = clipLayout(vocabulary.length);
  vocabulary.push(startOfText, endOfText);
  return writeTokenizer(layout, {
    type: 'BPE',
    dropout: null,
    unk_token: endOfText,
    continuing_subword_prefix: '',
    end_of_word_suffix: endOfWord,
    fuse_unk: false,
    byte_fallback: false,
    vocab: Object.fromEntries(vocabulary.map((token, id) => [token, id])),
    merges: merges.map(([left, right]) => `${left} ${right}`),
  });
}

/** Splits text as the published CLIP `tokenizer.json` does: contractions, letters, single digits, other symbols. */
function clipLayout(startId: number): Layout {
  const words = `'s|'t|'re|'ve|'m|'ll|'d|[\\p{L}]+|[\\p{N}]|[^\\s\\p{L}\\p{N}]+`;
  return {
    added_tokens: [
      // The start token is matched after normalisation and the end token before it, as in the published file.
      { ...specialToken(startOfText, startId), normalized: true },
      specialToken(endOfText, startId + 1),
    ],
    normalizer: {
      type: 'Sequence',
      normalizers: [
        { type: 'NFC' },
        { type: 'Replace', pattern: { Regex: '\\s+' }, content: ' ' },
        { type: 'Lowercase' },
      ],
    },
    pre_tokenizer: {
      type: 'Sequence',
      pretokenizers: [
        {
          type: 'Split',
          pattern: { Regex: `<\\|startoftext\\|>|<\\|endoftext\\|>|${words}` },
          behavior: 'Removed',
          invert: true,
        },
        { type: 'ByteLevel', add_prefix_space: false, trim_offsets: true, use_regex: true },
      ],
    },
    post_processor: {
      type: 'RobertaProcessing',
      sep: [endOfText, startId + 1],
      cls: [startOfText, startId],
      trim_offsets: false,
      add_prefix_space: false,
    },
    decoder: { type: 'ByteLevel', add_prefix_space: true, trim_offsets: true, use_regex: true },
  };
}

/**
 * One visible character per byte, in vocabulary order: printable Latin-1 bytes stand for themselves and come first,
 * the others take the code points from 256 on (the convention of GPT-2's byte-level vocabulary).
 */
function byteAlphabet(): string[] {
  const isPrintable = (byte: number) =>
    (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xff && byte !== 0xad);
  const bytes = Array.from({ length: 256 }, (_, byte) => byte);
  const others = bytes.filter((byte) => !isPrintable(byte));
  return [
    ...bytes.filter(isPrintable).map((byte) => String.fromCodePoint(byte)),
    ...others.map((_, index) => String.fromCodePoint(256 + index)),
  ];
}

type Pair = readonly [left: string, right: string];

/**
 * Merges the most frequent pair of neighbours until `limit` tokens are made or no pair repeats. Equally frequent pairs
 * go in code-unit order. `words[i]` (pieces, changed in place) occurs `counts[i]` times.
 */
function learnMerges(
  words: string[][],
  counts: readonly number[],
  limit: number,
): { merges: Pair[]; tokens: Set<string> } {
  const pairs = new Map<string, { pair: Pair; count: number; words: Set<number> }>();
  // Neither bytes as characters nor `</w>` contain a space, so it separates the two halves of a key.
  const countPairs = (word: number, sign: 1 | -1) => {
    const pieces = words[word]!;
    for (let i = 1; i < pieces.length; i++) {
      const pair = [pieces[i - 1]!, pieces[i]!] as const;
      const key = pair.join(' ');
      const entry = pairs.get(key) ?? { pair, count: 0, words: new Set() };
      entry.count += sign * counts[word]!;
      entry.words.add(word);
      if (entry.count > 0) pairs.set(key, entry);
      else pairs.delete(key);
    }
  };
  for (let word = 0; word < words.length; word++) countPairs(word, 1);

  const merges: Pair[] = [];
  // A set, because two pairs may spell one token ("a bc" and "ab c").
  const tokens = new Set<string>();
  while (tokens.size < limit) {
    let best = '';
    let bestCount = minimumPairCount - 1;
    for (const [key, { count }] of pairs) {
      if (count > bestCount || (count === bestCount && best !== '' && key < best)) {
        best = key;
        bestCount = count;
      }
    }
    const entry = pairs.get(best);
    if (!entry) break;
    merges.push(entry.pair);
    tokens.add(entry.pair.join(''));
    for (const word of entry.words) {
      countPairs(word, -1);
      words[word] = mergePair(words[word]!, entry.pair);
      countPairs(word, 1);
    }
  }
  return { merges, tokens };
}

function mergePair(pieces: readonly string[], [left, right]: Pair): string[] {
  const merged: string[] = [];
  for (let i = 0; i < pieces.length; i++) {
    const joins = pieces[i] === left && pieces[i + 1] === right;
    merged.push(joins ? left + right : pieces[i]!);
    if (joins) i++;
  }
  return merged;
}

// T5: unigram language model (Kudo, arXiv 1804.10959), with the constants of SentencePiece's trainer

const pad = '<pad>';
const endOfSequence = '</s>';
const unknown = '<unk>';
const wordStart = '▁';

/** Characters that every vocabulary holds, so that an unseen English word or number can be spelt. */
const printableAscii = Array.from({ length: 0x7f - 0x21 }, (_, index) => String.fromCodePoint(0x21 + index));
/** Like SentencePiece, a piece has at most this many characters, */
const longestPiece = 16;
/** and training starts from this many seeds for each piece that will remain. */
const seedsPerPiece = 16;
/** Pieces expected fewer times than this in the captions are dropped after an EM step. */
const minimumExpectedCount = 0.5;
/** EM steps between two prunings, and the part of the pieces that survives one. */
const emStepsPerPruning = 2;
const survivingFraction = 0.75;
/** Pruning by likelihood stops this much above the target; the pieces with the best scores fill the vocabulary. */
const pruningMargin = 1.1;
/** A piece is one kind of characters, maybe at the start of a word: letters, one digit, or symbols. */
const wellFormedPiece = /^▁?(?:[\p{L}\p{M}]+|\p{N}|[^\p{L}\p{M}\p{N}▁]+)$/u;

/** Pieces with their log probabilities. */
type Scores = Map<string, number>;

/**
 * Trains a T5-like tokenizer: a unigram model over pieces of words, ids 0 `<pad>`, 1 `</s>`, 2 `<unk>`, then pieces
 * from the most to the least probable. Every character of the captions and all of printable ASCII are pieces.
 *
 * @returns the text of a `tokenizer.json`
 * @throws MmditxError `bad-option` when `vocabularySize` has no room for the special tokens and single characters
 */
export function trainT5Tokenizer(
  captions: Iterable<string>,
  { vocabularySize, lowercase = false }: T5TrainingOptions,
): string {
  const layout = t5Layout(lowercase);
  const words = new Map<string, number>();
  for (const [text, count] of countWords(captions, layout)) {
    for (const word of text.split(/(?=▁)/u)) words.set(word, (words.get(word) ?? 0) + count);
  }
  const characters = new Set([wordStart, ...printableAscii]);
  for (const word of words.keys()) for (const character of word) characters.add(character);
  const specialTokens = [pad, endOfSequence, unknown];
  requireRoom(vocabularySize, specialTokens.length + characters.size);

  const scores = trainUnigram(words, characters, vocabularySize - specialTokens.length);
  const pieces = [...scores].sort(([a, x], [b, y]) => y - x || (a < b ? -1 : 1));
  return writeTokenizer(layout, {
    type: 'Unigram',
    unk_id: specialTokens.indexOf(unknown),
    byte_fallback: false,
    // Six decimals keep the file small; differences below them never decide between two segmentations in practice.
    vocab: [...specialTokens.map((token) => [token, 0]), ...pieces.map(([piece, s]) => [piece, Number(s.toFixed(6))])],
  });
}

function t5Layout(lowercase: boolean): Layout {
  const metaspace = { type: 'Metaspace', replacement: wordStart, prepend_scheme: 'always', split: true };
  return {
    added_tokens: [pad, endOfSequence, unknown].map((token, id) => specialToken(token, id)),
    normalizer: {
      type: 'Sequence',
      normalizers: [
        { type: 'NFKC' },
        ...(lowercase ? [{ type: 'Lowercase' }] : []),
        { type: 'Replace', pattern: { Regex: '\\s+' }, content: ' ' },
        { type: 'Strip', strip_left: true, strip_right: true },
      ],
    },
    pre_tokenizer: metaspace,
    post_processor: {
      type: 'TemplateProcessing',
      single: [{ Sequence: { id: 'A', type_id: 0 } }, { SpecialToken: { id: endOfSequence, type_id: 0 } }],
      pair: [
        { Sequence: { id: 'A', type_id: 0 } },
        { SpecialToken: { id: endOfSequence, type_id: 0 } },
        { Sequence: { id: 'B', type_id: 0 } },
        { SpecialToken: { id: endOfSequence, type_id: 0 } },
      ],
      special_tokens: { [endOfSequence]: { id: endOfSequence, ids: [1], tokens: [endOfSequence] } },
    },
    decoder: metaspace,
  };
}

/** At most `size` pieces, all of `characters` among them, that make the words (with their counts) most probable. */
function trainUnigram(words: ReadonlyMap<string, number>, characters: ReadonlySet<string>, size: number): Scores {
  let scores = seedPieces(words, characters, size * seedsPerPiece);
  while (true) {
    for (let step = 0; step < emStepsPerPruning; step++) scores = maximise(expectedCounts(words, scores), characters);
    if (scores.size <= size * pruningMargin) break;
    const target = Math.max(Math.floor(size * pruningMargin), Math.floor(scores.size * survivingFraction));
    scores = prune(words, scores, characters, target);
  }
  const room = size - characters.size;
  const best = [...scores]
    .filter(([piece]) => !characters.has(piece))
    .sort(([a, x], [b, y]) => y - x || (a < b ? -1 : 1));
  return new Map([...scores].filter(([piece]) => characters.has(piece)).concat(best.slice(0, room)));
}

/** The repeated substrings that cover most of the captions (count times length), and every single character. */
function seedPieces(words: ReadonlyMap<string, number>, characters: ReadonlySet<string>, limit: number): Scores {
  const counts = new Map<string, number>();
  for (const [word, count] of words) {
    const letters = [...word];
    for (let start = 0; start < letters.length; start++) {
      for (let end = start + 2; end <= Math.min(letters.length, start + longestPiece); end++) {
        const piece = letters.slice(start, end).join('');
        if (wellFormedPiece.test(piece)) counts.set(piece, (counts.get(piece) ?? 0) + count);
      }
    }
    for (const letter of letters) counts.set(letter, (counts.get(letter) ?? 0) + count);
  }
  const repeated = [...counts].filter(([piece, count]) => count > 1 && !characters.has(piece));
  const coverage = ([piece, count]: [string, number]) => count * piece.length;
  repeated.sort((a, b) => coverage(b) - coverage(a) || (a[0] < b[0] ? -1 : 1));
  const seeds = [...characters].map((character): [string, number] => [character, counts.get(character) ?? 0]);
  return maximise(new Map([...seeds, ...repeated.slice(0, limit)]), characters);
}

/** A piece that ends at some position of a word, and where it starts. */
interface Arc {
  piece: string;
  start: number;
  score: number;
}

/** For each position of the word (in characters, 0 to its length), the pieces that end there. */
function lattice(word: string, scores: Scores, except?: string): Arc[][] {
  const letters = [...word];
  const arcs: Arc[][] = Array.from({ length: letters.length + 1 }, () => []);
  for (let start = 0; start < letters.length; start++) {
    let piece = '';
    for (let end = start + 1; end <= Math.min(letters.length, start + longestPiece); end++) {
      piece += letters[end - 1];
      const score = scores.get(piece);
      if (score !== undefined && piece !== except) arcs[end]!.push({ piece, start, score });
    }
  }
  return arcs;
}

/** E step: how often each piece is expected in the captions, over all segmentations of every word. */
function expectedCounts(words: ReadonlyMap<string, number>, scores: Scores): Map<string, number> {
  const expected = new Map<string, number>();
  for (const [word, count] of words) {
    const arcs = lattice(word, scores);
    const length = arcs.length - 1;
    const forward = new Float64Array(length + 1).fill(Number.NEGATIVE_INFINITY);
    const backward = new Float64Array(length + 1).fill(Number.NEGATIVE_INFINITY);
    forward[0] = 0;
    backward[length] = 0;
    for (let end = 1; end <= length; end++) {
      for (const { start, score } of arcs[end]!) forward[end] = logAdd(forward[end]!, forward[start]! + score);
    }
    for (let end = length; end > 0; end--) {
      for (const { start, score } of arcs[end]!) backward[start] = logAdd(backward[start]!, backward[end]! + score);
    }
    for (let end = 1; end <= length; end++) {
      for (const { piece, start, score } of arcs[end]!) {
        const probability = Math.exp(forward[start]! + score + backward[end]! - forward[length]!);
        expected.set(piece, (expected.get(piece) ?? 0) + count * probability);
      }
    }
  }
  return expected;
}

/** M step: log probabilities under a sparse Dirichlet prior, which takes from the rare pieces (digamma for log). */
function maximise(counts: ReadonlyMap<string, number>, characters: ReadonlySet<string>): Scores {
  const kept = new Map([...counts].filter(([piece, count]) => characters.has(piece) || count >= minimumExpectedCount));
  for (const character of characters) {
    kept.set(character, Math.max(minimumExpectedCount, counts.get(character) ?? 0));
  }
  let total = 0;
  for (const count of kept.values()) total += count;
  const logTotal = digamma(total);
  return new Map([...kept].map(([piece, count]) => [piece, digamma(count) - logTotal]));
}

/** Keeps the `target` pieces without which the captions would lose most likelihood, and all single characters. */
function prune(
  words: ReadonlyMap<string, number>,
  scores: Scores,
  characters: ReadonlySet<string>,
  target: number,
): Scores {
  const uses = new Map<string, number>();
  let total = 0;
  for (const [word, count] of words) {
    for (const piece of bestSegmentation(word, scores)) {
      uses.set(piece, (uses.get(piece) ?? 0) + count);
      total += count;
    }
  }
  const losses: [piece: string, loss: number][] = [];
  for (const [piece, score] of scores) {
    const used = uses.get(piece) ?? 0;
    if (characters.has(piece) || used === 0) continue;
    // Without the piece, each of its uses becomes the next best segmentation of it, whose pieces then count more.
    const replacement = bestSegmentation(piece, scores, piece);
    const newTotal = total + used * (replacement.length - 1);
    const before = score;
    let after = 0;
    for (const part of replacement) after += Math.log((uses.get(part) ?? 0) + used) - Math.log(newTotal);
    losses.push([piece, (used / total) * (before - after)]);
  }
  losses.sort(([a, x], [b, y]) => y - x || (a < b ? -1 : 1));
  const survivors = losses.slice(0, Math.max(0, target - characters.size)).map(([piece]) => piece);
  return new Map([...characters, ...survivors].map((piece) => [piece, scores.get(piece)!]));
}

/** The most probable segmentation (Viterbi), without the piece `except`. Single characters make one always exist. */
function bestSegmentation(word: string, scores: Scores, except?: string): string[] {
  const arcs = lattice(word, scores, except);
  const best = new Float64Array(arcs.length).fill(Number.NEGATIVE_INFINITY);
  best[0] = 0;
  const last = arcs.map((ending, end) => {
    let chosen: Arc | undefined;
    for (const arc of ending) {
      if (best[arc.start]! + arc.score > best[end]!) {
        best[end] = best[arc.start]! + arc.score;
        chosen = arc;
      }
    }
    return chosen;
  });
  const pieces: string[] = [];
  for (let arc = last.at(-1); arc; arc = last[arc.start]) pieces.unshift(arc.piece);
  return pieces;
}

function logAdd(a: number, b: number): number {
  if (a === Number.NEGATIVE_INFINITY) return b;
  const larger = Math.max(a, b);
  return larger + Math.log1p(Math.exp(Math.min(a, b) - larger));
}

/** Derivative of log gamma for x > 0: recurrence up to 7, then the asymptotic series (Abramowitz and Stegun 6.3.18). */
function digamma(x: number): number {
  let shifted = x;
  let result = 0;
  for (; shifted < 7; shifted++) result -= 1 / shifted;
  const inverseSquare = 1 / (shifted * shifted);
  const series = inverseSquare * (1 / 12 - inverseSquare * (1 / 120 - inverseSquare / 252));
  return result + Math.log(shifted) - 1 / (2 * shifted) - series;
}

// Both

/** Words of the captions and their counts, split by the very code that will split prompts. */
function countWords(captions: Iterable<string>, layout: Layout): Map<string, number> {
  const { normalizer, pre_tokenizer: split } = new Tokenizer(
    { ...layout, added_tokens: [], model: { type: 'BPE', vocab: {}, merges: [] } },
    {},
  );
  const counts = new Map<string, number>();
  for (const caption of captions) {
    for (const word of split!.pre_tokenize(normalizer!.normalize(caption))) {
      if (word !== '' && word !== wordStart) counts.set(word, (counts.get(word) ?? 0) + 1);
    }
  }
  return counts;
}

function requireRoom(vocabularySize: number, smallest: number): void {
  if (!Number.isInteger(vocabularySize) || vocabularySize < smallest) {
    throw new MmditxError(
      'bad-option',
      `A vocabulary of ${vocabularySize} entries is too small for these captions: vocabularySize must be a whole number, at least ${smallest}.`,
    );
  }
}

function specialToken(content: string, id: number): object {
  return { id, content, single_word: false, lstrip: false, rstrip: false, normalized: false, special: true };
}

function writeTokenizer(layout: Layout, model: object): string {
  return `${JSON.stringify({ version: '1.0', truncation: null, padding: null, ...layout, model }, null, 1)}\n`;
}
