// llama.cpp behind a pipe: it reads prompts and goes on from them, one sequence at a time, and saves and
// loads the sequence's state in files of its own (`llama_state_seq_save_file` and
// `llama_state_seq_load_file`).
//
//     node llama.mjs DIRECTORY_OF_NODE_MODULES MODEL
//
// A command is a line, and so is its answer, `ok ...` or `error REASON`. Tokens are numbers with blanks
// between them, times are nanoseconds.
//
//     tokens COUNT PATH     the file's first tokens, and again from  -> ok TOKENS
//                           its beginning if it has fewer
//     text TOKENS           what they say, in JSON                   -> ok STRING
//     forget                empties the sequence                     -> ok 0
//     read TOKENS           appends them to the sequence             -> ok TIME
//     go_on COUNT TOKEN     appends the token, and so many that      -> ok TIME TOKENS
//                           the model finds likeliest after it; the
//                           time is that until the first of them
//     save PATH             saves the sequence's state               -> ok TIME
//     load PATH             loads it, in place of what is there      -> ok TIME
//
// It ends when its input does.
import {createRequire} from "node:module";
import {readFile} from "node:fs/promises";
import {availableParallelism} from "node:os";
import {createInterface} from "node:readline";
import {pathToFileURL} from "node:url";
import path from "node:path";

const [packages, modelPath] = process.argv.slice(2);
const require = createRequire(path.resolve(packages, "package.json"));
const {getLlama, LlamaLogLevel} = await import(pathToFileURL(require.resolve("node-llama-cpp")));

const LONGEST = 8192;

// Threads that wait for one another spin, so more of them than processors are slower by far.
const THREADS = Number(process.env.LLM_THREADS) || availableParallelism();
const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error, maxThreads: THREADS});
const model = await llama.loadModel({modelPath});
// A state that is loaded lies elsewhere in the cache than it did when it was saved. Flash attention in
// one thread adds up over the tokens in their order wherever they lie; everything else may round
// otherwise, and then go on with other tokens.
const context = await model.createContext({contextSize: LONGEST, flashAttention: true});
const sequence = context.getSequence();

const now = () => process.hrtime.bigint();
const numbers = (text) => text.split(" ").map(Number);
const timed = async (work) => {
    const begun = now();
    await work();
    return now() - begun;
};

const commands = {
    async tokens(argument) {
        const [count, file] = argument.split(/ (.*)/s);
        const words = model.tokenize(await readFile(file, "utf8"));
        return Array.from({length: Number(count)}, (_, at) => words[at % words.length]).join(" ");
    },
    async text(tokens) {
        return JSON.stringify(model.detokenize(numbers(tokens)));
    },
    async forget() {
        await sequence.clearHistory();
        return 0;
    },
    async read(tokens) {
        return timed(() => sequence.evaluateWithoutGeneratingNewTokens(numbers(tokens)));
    },
    async go_on(argument) {
        const [count, token] = numbers(argument);
        const begun = now();
        let first;
        const found = [];
        llama.maxThreads = 1;
        for await (const next of sequence.evaluate([token], {temperature: 0, yieldEogToken: true})) {
            first ??= now() - begun;
            found.push(next);
            if (found.length === count)
                break;
        }
        llama.maxThreads = THREADS;
        return [first, ...found].join(" ");
    },
    async save(file) {
        return timed(() => sequence.saveStateToFile(file));
    },
    async load(file) {
        return timed(() => sequence.loadStateFromFile(file, {acceptRisk: true}));
    }
};

console.log("ready");
for await (const line of createInterface({input: process.stdin})) {
    const [command, argument] = line.split(/ (.*)/s);
    try {
        console.log(`ok ${await commands[command](argument)}`);
    } catch (error) {
        console.log(`error ${String(error).replaceAll("\n", " ")}`);
    }
}
process.exit(0);
