%% One load, in the calling process: slice by slice, until a deadline.
%%
%% @private
-module(erllama_cache_load).

-export([run/4, described/1, remove_corrupt/3]).

%% Loads the file of a key. At most `Timeout' milliseconds pass before the result is `{error,
%% timeout}', but for the slice that runs then; nothing stays open.
-spec run(erllama_cache_nif:root(), erllama_cache_nif:key(), none | erllama_cache_nif:secret(),
          timeout()) ->
    {ok, erllama_cache_store:file_info(), Payload :: binary()} | miss | {error, term()}.
run(Path, Key, Secret, Timeout) ->
    Deadline = deadline(Timeout),
    case once(Path, Key, Secret, Deadline) of
        %% A distributed file system has lost the file that the name stood for: by another node's
        %% replacement or eviction, or while a replica healed. What the name stands for now, if for
        %% anything, a second look tells.
        {error, estale} -> once(Path, Key, Secret, Deadline);
        Result -> Result
    end.

deadline(infinity) -> infinity;
deadline(Timeout) -> erlang:monotonic_time(millisecond) + Timeout.

once(Path, Key, Secret, infinity) ->
    Begin = fun(Turn) -> erllama_cache_nif:load(Turn, Path, Key, Secret) end,
    erllama_cache_io_limit:run_slices(Begin, fun erllama_cache_nif:load_more/2);
once(Path, Key, Secret, Deadline) ->
    case slice(fun(Turn) -> erllama_cache_nif:load(Turn, Path, Key, Secret) end, Deadline) of
        {more, Load} ->
            try
                more(Load, Deadline)
            after
                %% Closes nothing if the load has ended.
                ok = erllama_cache_nif:load_abort(Load)
            end;
        Result ->
            Result
    end.

more(Load, Deadline) ->
    case slice(fun(Turn) -> erllama_cache_nif:load_more(Turn, Load) end, Deadline) of
        more -> more(Load, Deadline);
        Result -> Result
    end.

%% One turn, if it comes in time.
slice(Call, Deadline) ->
    case Deadline - erlang:monotonic_time(millisecond) of
        Left when Left < 0 ->
            {error, timeout};
        Left ->
            case erllama_cache_io_limit:run(Call, Left, fun() -> {error, timeout} end) of
                {gave_up, Error} -> Error;
                Result -> Result
            end
    end.

%% A load's result as an event has it: see erllama_cache_telemetry.
-spec described({ok, map(), binary()} | miss | {error, term()}) ->
    {#{bytes => non_neg_integer()}, #{result := term()}}.
described({ok, _Info, Payload}) -> {#{bytes => byte_size(Payload)}, #{result => ok}};
described(miss) -> {#{}, #{result => miss}};
described({error, Reason}) -> {#{}, #{result => Reason}}.

%% Removes the file of a key if it is corrupt.
-spec remove_corrupt(erllama_cache_nif:root(), erllama_cache_nif:key(),
                     none | erllama_cache_nif:secret()) ->
    boolean() | miss | {error, term()}.
remove_corrupt(Path, Key, Secret) ->
    Begin = fun(Turn) -> erllama_cache_nif:remove_corrupt(Turn, Path, Key, Secret) end,
    erllama_cache_io_limit:run_slices(Begin, fun erllama_cache_nif:remove_corrupt_more/2).
