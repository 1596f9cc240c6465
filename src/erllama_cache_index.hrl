%% A row of a store's index, see erllama_cache_index.
-record(row, {
    key :: erllama_cache_nif:key() | '_' | '$2',
    %% Of a file, what its key is made of, and how much of it; `unknown' of one that was not read.
    length = unknown :: erllama_cache_nif:key_length() | unknown | '_',
    %% Bytes: of the file, or of what a reservation's file may take.
    size = 0 :: non_neg_integer() | '_',
    %% Milliseconds of system time.
    last_used = 0 :: integer() | '_' | '$1',
    %% See erllama_cache_evict.
    rank = 0 :: erllama_cache_index:rank() | '_' | '$1',
    state :: erllama_cache_index:state() | '_',
    token :: reference() | '_',
    %% Of a reservation: its owner, and the end of its lease in milliseconds of monotonic time.
    pid :: pid() | undefined | '_',
    expires :: integer() | undefined | '_',
    %% Of a file: uses not yet noted in it, and the time of the last note in seconds.
    uses = 0 :: non_neg_integer() | '_',
    noted = 0 :: integer() | '_'
}).
