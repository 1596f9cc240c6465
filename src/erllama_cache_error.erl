%% Describes the reasons of errors in English.
%%
%% @private
-module(erllama_cache_error).

-export([format/1]).
-export_type([save_error/0]).

-type save_error() ::
    max_concurrent | already_present | conflict | expired | tier_busy | cancelled
    | {missing_key, atom()} | {invalid_meta, atom()} | {unknown_quant_byte, byte()}
    | prefix_too_long | {read_back, atom()} | no_links | out_of_turn
    | {wrong_tier, erllama_cache_host:tier()} | exceeds_max_bytes | no_room
    | erllama_cache_path:unusable() | file:posix() | {errno, integer()}
    | {raised, error | exit | throw, term(), list()} | {saver_died, term()}.
%% Why a save fails in erllama or in the built-in store. Another host may have reasons of its own.

%% Accepts the reasons of erllama_cache_writer and erllama_cache_store, with or without `{error, _}'
%% around them.
-spec format(Reason :: term()) -> string().
format({error, Reason}) -> format(Reason);
format(max_concurrent) -> "no slot became free in time";
format(weight_exceeds_limit) -> "the weight is above the limit, so it could never be served";
format({pending, N}) -> text("~w saves are still pending", [N]);
format(cancelled) -> "the save was cancelled";
format(already_present) -> "the key is stored already";
format(conflict) -> "another process is saving the key";
format(expired) -> "the reservation of the key was lost to another process";
format(prefix_too_long) -> "prompt, tokens and texts are too long together";
format({unknown_host, Missing}) ->
    Names = [io_lib:format("~ts:~ts/~w", [M, F, A]) || {M, F, A} <- Missing],
    text("erllama is not there, or of an unknown kind: it lacks ~ts", [lists:join(", ", Names)]);
format({missing_key, Key}) -> text("the build_meta has no ~tp", [Key]);
format({invalid_meta, Key}) -> text("the build_meta's ~tp has the wrong type or size", [Key]);
format({unknown_quant_byte, Byte}) ->
    text("the host's table does not name the build_meta's quant_type (byte ~w)", [Byte]);
format({read_back, What}) ->
    text("what was written did not come back the same (~ts)", [words(What)]);
format({corrupt, What}) -> text("the file is corrupt: ~ts", [words(What)]);
format(unauthenticated) -> "the file was not made with this node's secret";
format(not_regular) -> "under the key's name stands something that is not a regular file";
format({wrong_tier, Tier}) -> text("the store is for tier ~ts", [Tier]);
format(exceeds_max_bytes) -> "the file is larger than the store may be";
format(timeout) -> "the load, or the save that it waited for, took longer than it may";
format(tier_busy) -> "the tier server, busy with loads, did not answer in time";
format(no_room) ->
    "running saves, or files that are pinned or cannot be removed, leave too little room";
format({mac_key, bad_key}) -> "the secret is not 32 bytes";
format({mac_key, raised}) -> "the function that gives the secret has raised";
format({mac_key, Reason}) -> text("the secret cannot be read: ~ts", [format(Reason)]);
format({errno, Number}) -> text("the system's error ~w", [Number]);
format(no_links) ->
    "the root's file system has neither links nor a rename that replaces nothing: use another one";
format(out_of_turn) -> "the library was called out of turn, which is a bug";
format(enokey) -> "the encryption key of the directory is not loaded";
format({raised, Class, Reason, _Stack}) -> text("the save raised ~tp: ~tp", [Class, Reason]);
format({saver_died, Reason}) -> text("the process that saved has died: ~tp", [Reason]);
format({unencodable, latin1}) ->
    "file names are Latin-1 in this VM, and the root's cannot be: start it with +fnu, "
    "or in a UTF-8 locale";
format({unencodable, Encoding}) ->
    text("the root's name cannot be encoded as file names are in this VM (~ts)", [Encoding]);
format(badarg) -> "the root's name is none, or has a NUL";
format(Reason) when is_atom(Reason) -> file:format_error(Reason);
format(Reason) -> text("~tp", [Reason]).

text(Format, Args) ->
    lists:flatten(io_lib:format(Format, Args)).

words(Name) ->
    string:replace(atom_to_list(Name), "_", " ", all).
