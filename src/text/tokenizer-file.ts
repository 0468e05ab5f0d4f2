/**
 * What of a `tokenizer.json` (the format of Hugging Face's tokenizers) is used: the steps that CLIP's and T5's are made
 * of, with the settings that matter to encoding. Other steps are refused, as a file can ask for an expression that
 * runs for ever or for a text that grows without bound.
 */
import { z } from 'zod';
import { isCount, isText, listOf, recordOf, shortList } from '../weights/json.ts';
import { quote } from '../weights/quote.ts';
import { CLIP_WORDS } from './clip-vocabulary.ts';

/** Regular expressions of the published files and of those that this package trains. */
const EXPRESSIONS: readonly string[] = [CLIP_WORDS, '\\s+', ' {2,}'];

/** Ids become 32-bit integers. */
const MAX_ID = 2 ** 31 - 1;
/** T5 has 103, of up to 15 characters. */
const MAX_ADDED_TOKENS = 10_000;
const MAX_ADDED_LENGTH = 256;
/** Steps of a sequence; the published files have up to three. */
const MAX_STEPS = 16;

const id = z.int().nonnegative().max(MAX_ID);
const flag = z.boolean().optional();
/** A text that stands for a space; longer ones could make each step multiply a text's length. */
const character = z.string().max(1);

const expression = z.string().refine((text) => EXPRESSIONS.includes(text), {
  error: ({ input }) => `the expression ${quote(String(input))} is none of CLIP's or T5's`,
});
const pattern = z
  .object({ Regex: expression.optional(), String: z.string().min(1).optional() })
  .refine((of) => (of.Regex === undefined) !== (of.String === undefined), 'neither an expression nor a text');

const normalizer = z.discriminatedUnion('type', [
  z.object({ type: z.enum(['NFC', 'NFD', 'NFKC', 'NFKD', 'Lowercase', 'StripAccents', 'Precompiled']) }),
  z.object({ type: z.literal('Replace'), pattern, content: character }),
  z.object({ type: z.literal('Strip'), strip_left: flag, strip_right: flag }),
  z.object({ type: z.literal('Prepend'), prepend: character }),
]);

const splitter = z.discriminatedUnion('type', [
  z.object({ type: z.enum(['Whitespace', 'WhitespaceSplit']) }),
  z.object({ type: z.literal('ByteLevel'), add_prefix_space: flag, use_regex: flag }),
  z.object({
    type: z.literal('Metaspace'),
    replacement: character,
    prepend_scheme: z.enum(['always', 'first', 'never']).optional(),
  }),
  z.object({ type: z.literal('Split'), pattern, behavior: z.string().optional(), invert: flag }),
]);

const end = z.tuple([z.string(), id]);
const piece = z.union([
  z.object({ SpecialToken: z.object({ id: z.string() }) }),
  z.object({ Sequence: z.object({ id: z.enum(['A', 'B']) }) }),
]);
const ends = z.discriminatedUnion('type', [
  z.object({ type: z.literal('ByteLevel') }),
  z.object({ type: z.enum(['RobertaProcessing', 'BertProcessing']), cls: end, sep: end }),
  z.object({ type: z.literal('TemplateProcessing'), single: shortList(piece, MAX_STEPS) }),
]);

const addedToken = z.object({
  id,
  content: z.string().min(1).max(MAX_ADDED_LENGTH),
  lstrip: flag,
  rstrip: flag,
  normalized: flag,
  special: flag,
});

const pairs = (value: unknown): value is string[] => Array.isArray(value) && value.length === 2 && value.every(isText);
const bytePairs = z.object({
  // Older files do not name it.
  type: z.literal('BPE').default('BPE'),
  vocab: recordOf((value): value is number => isCount(value) && value <= MAX_ID),
  merges: z.union([listOf(isText), listOf(pairs)]),
  unk_token: z.string().nullish(),
  end_of_word_suffix: z.string().max(MAX_ADDED_LENGTH).nullish(),
  byte_fallback: flag,
  ignore_merges: flag,
});

const scored = (value: unknown): value is [string, number] =>
  Array.isArray(value) && value.length === 2 && isText(value[0]) && Number.isFinite(value[1]);
const unigram = z
  .object({
    type: z.literal('Unigram').default('Unigram'),
    vocab: listOf(scored),
    unk_id: z.int().nonnegative(),
  })
  .refine(({ vocab, unk_id }) => unk_id < vocab.length, 'unk_id is beyond the vocabulary');

/** A step, or several in a list of some name. */
function steps<Step extends z.ZodType, Name extends string>(step: Step, name: Name) {
  const list = z.object({ type: z.literal('Sequence'), [name]: shortList(step, MAX_STEPS) });
  return z
    .union([step, list])
    .nullish()
    .transform((value) => value ?? null);
}

/** A `tokenizer.json` with what encoding needs, in the form that `@huggingface/tokenizers` takes. */
export const tokenizerSchema = z
  .object({
    added_tokens: shortList(addedToken, MAX_ADDED_TOKENS),
    normalizer: steps(normalizer, 'normalizers'),
    pre_tokenizer: steps(splitter, 'pretokenizers'),
    post_processor: steps(ends, 'processors'),
    model: z.union([bytePairs, unigram]),
    /** Ids are never made text. */
    decoder: z.unknown().transform(() => null),
  })
  .refine(
    ({ model, added_tokens }) =>
      model.type === 'Unigram' ||
      model.unk_token == null ||
      Object.hasOwn(model.vocab, model.unk_token) ||
      added_tokens.some(({ content }) => content === model.unk_token),
    { path: ['model', 'unk_token'], error: 'not in the vocabulary' },
  );
